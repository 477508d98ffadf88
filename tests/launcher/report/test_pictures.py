"""Attention maps as cells over an image, and answers with thumbnails."""

from __future__ import annotations

import base64
import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.commands import report as command
from launcher.commands.report import read_report, with_pictures
from launcher.report.answer_pictures import THUMBNAIL, answer_pictures
from launcher.report.focus_pictures import focus_pictures
from launcher.report.page import render_page
from tests.launcher.report.test_evaluations import TEACHER
from tests.launcher.report.test_page import EVIL, Page, squeezed

IMAGE = "data:image/jpeg;base64,AAAA"


def maps(**changes: Any) -> dict[str, Any]:
    shares = {"teacher": [0.4, 0.1, 0.0, 0.1], "start": [0.1, 0.1, 0.1, 0.2], "student": [0.3, 0.0, 0.0, 0.2]}
    sample = {"id": "a", "question": "Where?", "answer": "there", "image": IMAGE, "maps": shares, **changes}
    return {"side": 2, "top_k": 2, "samples": [sample]}


def test_cells_are_where_the_tokens_are_and_as_dark_as_their_share() -> None:
    (picture,) = focus_pictures(maps())
    teacher, start, student = picture.overlays
    assert [one.title for one in picture.overlays] == ["teacher", "student before", "student after"]
    assert [(cell.x, cell.y) for cell in teacher.cells] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert teacher.cells[1].opacity == pytest.approx(teacher.cells[0].opacity / 4, abs=0.001)
    assert teacher.cells[1].opacity > 0
    assert teacher.cells[2].opacity == 0
    assert [cell.in_focus for cell in teacher.cells] == [True, True, False, False]
    assert [cell.in_focus for cell in student.cells] == [True, False, False, True]
    assert teacher.note == "60 % of a text token's attention"
    assert student.note.endswith("1 of 2 focus tokens are the teacher's")
    assert start.cells[3].opacity == student.cells[0].opacity


def test_no_token_is_marked_where_all_are_in_focus() -> None:
    (picture,) = focus_pictures(maps() | {"top_k": 4})
    assert not any(cell.in_focus for overlay in picture.overlays for cell in overlay.cells)
    assert "focus" not in picture.overlays[2].note


def test_maps_without_attention_are_drawn() -> None:
    (picture,) = focus_pictures(maps(maps={"start": [0.0] * 4}))
    assert {cell.opacity for cell in picture.overlays[0].cells} == {0.0}


@pytest.fixture
def pictured(run: Path, evaluate, tmp_path: Path):
    """A report with 10 of 40 answers wrong, each about the same large image."""
    models = {"s": (run, 30), "t": (TEACHER, 40)}
    out = evaluate(models, question="Which? <b>", image="big.png")
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "questions" / "big.png")
    return read_report([run], [out])


def test_wrong_and_right_answers_are_spread_over_the_questions(pictured) -> None:
    found = answer_pictures(pictured.evaluations, 3)
    assert [one.right for one in found] == [False] * 3 + [True] * 3
    assert [one.question.rsplit(" ", 1)[1] for one in found] == ["30", "33", "36", "0", "10", "20"]
    assert [(said.model, said.text, said.right) for said in found[0].said] == [
        ("s", "no", False),
        ("t", "yes", True),
    ]
    assert len(answer_pictures(pictured.evaluations, 100)) == 40


def test_images_are_thumbnails_in_the_page(pictured) -> None:
    (image,) = answer_pictures(pictured.evaluations, 1)[0].images
    head, _, data = image.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert thumbnail.size == (THUMBNAIL, THUMBNAIL // 2)


def test_a_missing_image_is_said_beside_its_answer(pictured, tmp_path: Path) -> None:
    (tmp_path / "questions" / "big.png").unlink()
    one = answer_pictures(pictured.evaluations, 1)[0]
    assert one.images == ()
    assert "big.png" in one.problem


def test_the_page_shows_pictures_and_escapes_their_texts(pictured) -> None:
    answers = answer_pictures(pictured.evaluations, 1)
    said = tuple(replace(one, text=EVIL) for one in answers[0].said)
    focus = focus_pictures(maps(question=EVIL, answer=EVIL))
    shown = replace(
        pictured, focus=tuple(focus), answers=(replace(answers[0], said=said, question=EVIL), answers[1])
    )
    page = Page(render_page(shown))
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 5
    assert page.tags.count("image") == 3
    assert all(url.startswith("data:image/jpeg;base64,") for url in page.urls)
    text = squeezed(page)
    assert text.index("Wrong answers of run") < text.index(f"✗ s: {EVIL} ✓ t: {EVIL}")


def test_all_lines_of_the_error_of_the_attention_program_are_shown(run: Path, monkeypatch) -> None:
    def fail(stderr: bytes, expected: str) -> None:
        done = subprocess.CompletedProcess([], 2, stderr=stderr)
        monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: done)
        shown = with_pictures(read_report([run], ()), 1, "cpu")
        assert shown.problems == (f"no attention maps: {expected}",)

    fail(
        b"a warning\nalignkd: error: two files are missing:\n  one\n  two\n",
        "two files are missing:\n  one\n  two",
    )
    fail(b"Traceback\nValueError: \xff\n", "ValueError: \ufffd")
    fail(b"", "exit code 2")


def test_pictures_that_cannot_be_made_are_a_problem_of_the_page(pictured, monkeypatch) -> None:
    """The run has no image: the program says so, and the answers are there all the same."""
    shown = with_pictures(pictured, 2, "cpu")
    assert shown.focus == ()
    assert [problem for problem in shown.problems if "no sample with exactly one image" in problem]
    assert len(shown.answers) == 4
    monkeypatch.setattr(command, "_attention_maps", lambda *_: maps())
    shown = with_pictures(pictured, 2, "cpu")
    assert (len(shown.focus), shown.problems) == (1, ())
