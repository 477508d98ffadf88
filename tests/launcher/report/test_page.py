"""The page of whole and of incomplete runs, as text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.commands.report import read_report
from launcher.report.page import category_tables, render_page
from tests.launcher.conftest import FIXTURE
from tests.launcher.report.conftest import close_attempt, finish, write_rows
from tests.launcher.report.test_evaluations import START, TEACHER

EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps texts and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f" {data.strip()}"


def page_of(*runs: Path, evaluations: tuple[Path, ...] = ()) -> Page:
    return Page(render_page(read_report(runs, evaluations)))


def squeezed(page: Page) -> str:
    return " ".join(page.text.split())


def test_the_page_answers_the_three_questions(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30), "begin": (START, 10), "t": (TEACHER, 36)})
    page = page_of(run, evaluations=(out,))
    text = squeezed(page)
    better = text[text.index("Did the student get better?") : text.index("What did each term do?")]
    for said in ("75.0 (61.4 to 88.6)", "own, 40 questions", "t teacher 90.0", "begin start 25.0", "+50.0 ("):
        assert said in better
    terms = text[text.index("What did each term do?") : text.index("Can the number be trusted?")]
    assert "0.879 → 0.201 loss" in terms
    assert "reverse_kl 0.586 → 0.134 1" in terms
    trust = text[text.index("Can the number be trusted?") : text.index("Loss terms")]
    for said in (
        "state done",
        "steps 20 of 20",
        "attempts 1",
        "steps lost 0",
        "goodput 80 %",
        "wall time 0:50",
    ):
        assert said in trust
    assert "⚠" not in text


@pytest.mark.parametrize("parts", [1, 3])
def test_another_models_score_is_not_shown_as_the_students(run: Path, evaluate, parts: int) -> None:
    """More than two tasks, or parts of one, are a table."""
    out = evaluate({"s": (run, 30), "t": (TEACHER, 36)})
    for number in range(1, parts):
        shutil.copy(out / "t" / "own.jsonl", out / "t" / f"own.first-{40 + number}.jsonl")
    shutil.rmtree(out / "s")
    html = render_page(read_report([run], [out]))
    first_screen = html[: html.index("What did each term do?")]
    text = r'<p class="big">(.*?) <small>' if parts == 1 else r'</td><td class="n">(.*?)</td><td class="n">'
    assert re.findall(text, first_screen) == ["-"] * parts
    assert "90.0 (" in html


def test_the_table_of_many_tasks_has_scores_and_findings(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30), "t": (TEACHER, 36)})
    for model, number in itertools.product(("s", "t"), (41, 42)):
        shutil.copy(out / model / "own.jsonl", out / model / f"own.first-{number}.jsonl")
    text = squeezed(page_of(run, evaluations=(out,)))
    rows = re.findall(r"40 questions 75\.0 \(61\.4 to 88\.6\) (\S+ \([^)]*\) against .*?0\.031)", text)
    assert len(rows) == 3
    assert all(re.fullmatch(r"\N{MINUS SIGN}15\.0 \(.*\) against t: worse, p = 0\.031", row) for row in rows)


def test_scores_by_category_have_half_of_the_interval_of_the_scores(
    run: Path, evaluate, tmp_path: Path
) -> None:
    out = evaluate({"s": (run, 30), "t": (TEACHER, 40)})
    questions = tmp_path / "questions" / "own.json"
    records = json.loads(questions.read_text())
    kinds = [{"kind": "even" if number % 2 == 0 else "odd"} for number in range(len(records))]
    questions.write_text(json.dumps([record | kind for record, kind in zip(records, kinds, strict=True)]))
    report = read_report([run], [out])
    # 15 of 20: a standard error of sqrt(0.75 x 0.25 / 19), times 1.96. None where all are right.
    row = ["even", "75.0 ± 19.5", "100.0", "20"]
    assert category_tables(report.evaluations)[0][2] == [row, ["odd", *row[1:]]]
    assert "±: half of the 95 % interval." in render_page(report)


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(run: Path) -> None:
    page = page_of(run)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.urls == []
    html = render_page(read_report([run], ()))
    assert "default-src 'none'" in html
    assert re.search(r"url\(|@import|https?://", html) is None


def test_everything_from_files_is_escaped(run: Path, evaluate, copied_run, monkeypatch) -> None:
    """A run name, a task's kind, a configuration value, a column and a file that cannot be scored."""
    evil = copied_run(EVIL.replace("/", "|"))
    write_rows(evil, **{EVIL: 1.0})
    text = RunPaths(evil).config.read_text()
    RunPaths(evil).config.write_text(text.replace("name: run", f'name: "{EVIL}"'))
    out = evaluate({"s": (evil, 30)}, question=EVIL)
    (out / "s" / f"{EVIL.replace('/', '|')}.jsonl").write_text("{}\n")
    page = page_of(evil, run, evaluations=(out,))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 2
    assert page.text.count(EVIL.replace("/", "|")) >= 4


def test_where_the_time_went_adds_up(run: Path) -> None:
    text = squeezed(page_of(run))
    # 50 s in all; 40 s in steps: half of it the student's, a quarter the teacher's; saves took 4 s.
    for said in ("student 40 %, 0:20", "teacher 20 %, 0:10", "optimizer 8 %, 0:04", "data 4 %, 0:02"):
        assert said in text
    for said in ("rest of the steps 8 %, 0:04", "saves 8 %, 0:04", "start, export, lost steps 12 %, 0:06"):
        assert said in text
    assert "2GB, 3GB" in text


def test_runs_are_side_by_side_with_the_keys_that_differ(run: Path, copied_run) -> None:
    other = copied_run("other")
    text = RunPaths(other).config.read_text()
    RunPaths(other).config.write_text(text.replace("top_k: 16", "top_k: 4"))
    html = render_page(read_report([run, other], ()))
    marked = re.findall(r'<tr class="differs"><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>', html)
    assert ("distillation.top_k", "16", "4") in marked
    assert "training.seed" not in [key for key, _, _ in marked]
    assert "training.seed" in html
    assert html.count('class="line"') > len(read_report([run], ()).runs[0].columns.points)


def test_a_run_that_was_not_started_has_a_page_that_says_so(make_run) -> None:
    text = squeezed(page_of(make_run()[0]))
    for said in (
        "No answers of",
        "has no rows in metrics.jsonl yet",
        "⚠ not started",
        "No attempt took any time yet",
    ):
        assert said in text
    assert "Loss terms" not in text


def test_a_run_that_failed_and_lost_steps_says_so(make_run) -> None:
    folder = make_run()[0]
    write_rows(folder, steps=12, skipped_steps=3, skipped_samples=2)
    close_attempt(folder, "crashed", last_step=15, saved_step=12, lost_steps=3)
    with RunPaths(folder).metrics.open("a") as file:
        file.write('{"step": 13, "loss": null, "ce": 1.0}\n{"step": 14, "lo')
    text = squeezed(page_of(folder))
    for said in (
        "⚠ failed",
        "attempts ⚠ 1 (crashed)",
        "steps lost ⚠ 3",
        "steps skipped ⚠ 3",
        "samples skipped ⚠ 24",
        "losses not finite ⚠ 1",
        "goodput ⚠ 48 %",
    ):
        assert said in text


@pytest.mark.parametrize("damage", ["result", "progress", "attempts", "metrics"])
def test_damaged_files_of_a_run_leave_a_page(run: Path, damage: str) -> None:
    path: Path = getattr(RunPaths(run), damage)
    path.write_bytes(b"\xff[] torn {")
    assert "Can the number be trusted?" in page_of(run).text


def test_a_run_of_an_earlier_version_has_a_page() -> None:
    text = squeezed(page_of(FIXTURE.parent / "old_run" / "run"))
    assert "steps ⚠ 3 of 6" in text
    assert "Loss terms" in text


def test_unknown_columns_are_drawn(make_run) -> None:
    folder = make_run()[0]
    finish(folder)
    write_rows(folder, gradient_norm_attention=0.5, something_new=2.0, weight_of_reverse_kl=3.0)
    text = squeezed(page_of(folder))
    assert "Gradient norms Before clipping. Logarithmic. gradient_norm_attention" in text
    assert "which distillation.balance moves. Logarithmic. weight_of_reverse_kl" in text
    assert "Other columns something_new" in text
