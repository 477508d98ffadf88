"""The program around the parts of the GPU check: parts that fail, hang or have no time, and its output."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.parts import PARTS, Outcome, Part, allowed_seconds, run_part

# Each writes a row, and half of another.
WRITES = 'import sys; file = open(sys.argv[1], \'w\'); file.write(\'{"what": "one"}\\n{"wh\'); file.flush(); '


def script(text: str) -> list[str]:
    return [sys.executable, "-c", WRITES + text]


def ended(allowed: float, text: str, folder: Path) -> Outcome:
    return run_part(Part("one", "One", 1.0), script(text), allowed, folder)


def test_a_part_that_fails_leaves_its_rows_and_the_end_of_its_log(tmp_path: Path) -> None:
    outcome = ended(60, "print('x\\n' * 99); sys.exit('out of luck')", tmp_path)
    assert (outcome.status, outcome.rows) == ("failed", [{"what": "one"}])
    assert outcome.log.splitlines()[-1] == "out of luck"
    assert len(outcome.log.splitlines()) == 15
    assert ended(60, "", tmp_path).status == "done"


def test_a_part_that_hangs_is_ended_in_time_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess; child = subprocess.Popen(['sleep', '600']); "
    child += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); child.wait()"
    started = time.monotonic()
    outcome = ended(8, child, tmp_path)
    assert time.monotonic() - started < 300  # the child alone would take 600
    assert (outcome.status, outcome.rows, outcome.log) == ("out of time", [{"what": "one"}], "")
    child_pid = int((tmp_path / "child").read_text())
    while alive(child_pid):  # it dies when it is next scheduled
        assert time.monotonic() - started < 300
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_without_time_is_not_started(tmp_path: Path) -> None:
    outcome = ended(1.0, "", tmp_path)
    assert (outcome.status, outcome.seconds, list(tmp_path.iterdir())) == ("not started", 0.0, [])


def test_parts_share_the_time_and_inherit_what_is_left() -> None:
    assert sum(part.share for part in PARTS) == pytest.approx(1.0)
    parts = [Part("a", "A", 0.5), Part("b", "B", 0.3), Part("c", "C", 0.2)]
    assert allowed_seconds(parts, 0, 100, spent=2) == 48
    assert allowed_seconds(parts, 1, 100, spent=10) == pytest.approx(70)
    assert allowed_seconds(parts, 2, 100, spent=99) == pytest.approx(1)
    assert allowed_seconds(parts[1:], 0, 100, spent=0) == pytest.approx(60)  # of a choice of parts
    assert allowed_seconds(parts[2:], 0, 100, spent=0) == pytest.approx(100)


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "performance.md").write_text("before\n<!-- gpu -->\nold\n<!-- end gpu -->\nafter\n")
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "performance")
    return tmp_path


def test_one_part_that_fails_does_not_end_the_rest(
    documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = iter(["sys.exit('out of luck')", "", ""])
    monkeypatch.setattr(program, "part_command", lambda part, tiny: script(next(texts)))
    out = documents / "gpu.json"
    arguments = ["--tiny", "--minutes", "2", "--out", str(out), "--parts", "head", "ceilings"]
    assert program.main(arguments) == 1
    document = json.loads(out.read_text())
    found = [(outcome["name"], outcome["status"]) for outcome in document["results"]]
    assert found == [("ceilings", "failed"), ("head", "done")]  # in their order, by value
    assert set(document["measured"]) == {"date", "commit", "machine", "load", "versions", "command"}
    assert "out of luck" in capsys.readouterr().out
    assert program.main(["--tiny", "--parts", "head"]) == 0
    assert sorted(path.name for path in documents.iterdir()) == ["gpu.json", "performance.md"]

    # What came back from another machine.
    assert program.main(["--results", str(out), "--publish"]) == 0
    published = (documents / "performance.md").read_text()
    assert published.startswith("before\n<!-- gpu -->\n**What the chip can do")
    assert published.endswith("<!-- end gpu -->\nafter\n")
    assert "| what |\n| --- |\n| one |" in published
    assert "commit " in published
    assert json.loads((documents / "performance" / "gpu.json").read_text()) == document


def test_nothing_is_measured_or_published_where_it_means_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (([], "there is no GPU here"), (["--tiny", "--publish"], "nothing worth")):
        with pytest.raises(SystemExit):
            program.main(arguments)
        assert words in capsys.readouterr().err


def test_the_page_has_a_place_for_the_tables() -> None:
    assert "<!-- gpu -->\n" in report.DOCUMENT.read_text(encoding="utf-8")
