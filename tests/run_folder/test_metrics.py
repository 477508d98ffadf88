from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from alignkd.run_folder.metrics import MetricsFile, RowReader, cut_rows_after, iter_rows, last_rows, row_line
from tests.needs import small_disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(rows) -> list[int]:
    return [row["step"] for row in rows]


def test_a_row_is_one_line_and_is_read_back(path: Path) -> None:
    row = {"step": 1, "loss": 0.1 + 0.2, "text": "a\nb\u2028\u00e9", "none": None}
    path.write_text(row_line(row) * 2)
    assert list(iter_rows(path)) == [row, row]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_written_as_null(value: float) -> None:
    line = row_line({"step": 1, "gradient_norm": value})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "gradient_norm": None}


TORN = ('{"step": 2, "lo', "", "[2]", "7", '"text"', b"\xff\xfe", b"\0" * 9, b'{"step": 2, "text": "\xff"}')


@pytest.mark.parametrize("torn", TORN)
def test_what_is_no_row_is_skipped_wherever_it_stands(path: Path, torn: str | bytes) -> None:
    garbage = torn if isinstance(torn, bytes) else torn.encode()
    path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n' + garbage)
    assert steps(iter_rows(path)) == [1, 3]
    assert steps(last_rows(path, 10)) == [1, 3]


def test_a_file_that_cannot_be_read_has_no_rows(path: Path) -> None:
    assert list(iter_rows(path)) == last_rows(path, 3) == []
    path.mkdir()
    assert list(iter_rows(path)) == last_rows(path, 3) == []


@pytest.mark.parametrize("length", [10, 3000])
def test_the_last_rows_are_read_from_the_end(path: Path, length: int) -> None:
    path.write_text("".join(row_line({"step": step, "text": "x" * length}) for step in range(200)))
    assert steps(last_rows(path, 3)) == [197, 198, 199]
    assert steps(last_rows(path, 500)) == list(range(200))
    with path.open("rb") as file:
        whole = file.read()
    # The part before is not looked at: what stands there may be anything, and of any length.
    path.write_bytes(b"\0" * 10**6 + whole[-30_000:])
    assert steps(last_rows(path, 3)) == [197, 198, 199]


def test_the_end_of_a_line_that_began_before_the_tail_is_no_row(path: Path) -> None:
    inner = b'{"step": 1' + b" " * 4085 + b"}"
    assert len(inner) == 4096  # what is read for one row
    path.write_bytes(b'{"torn": ' + inner)
    assert last_rows(path, 1) == []


def test_rows_of_later_steps_and_torn_lines_are_cut(path: Path) -> None:
    lines = [row_line({"step": step, "loss": 0.1 * step}) for step in (1, 2, 3)]
    path.write_bytes("".join(lines).encode() + b'\xff\0\n{"step": 2, "lo')
    cut_rows_after(path, 2)
    assert path.read_text() == "".join(lines[:2])
    cut_rows_after(path, 0)
    assert path.read_text() == ""
    # Nothing is gone.
    kept = {step: (path.parent / f"metrics.jsonl.after-step-{step}").read_bytes() for step in (0, 2)}
    assert kept == {0: "".join(lines[:2]).encode(), 2: lines[2].encode() + b'\xff\0\n{"step": 2, "lo\n'}


def test_rows_that_are_cut_again_are_added_to_those_kept_before(path: Path) -> None:
    kept = path.with_name("metrics.jsonl.after-step-1")
    first, second = (row_line({"step": 2, "loss": loss}) for loss in (0.5, 0.25))
    for line in (first, second, second):  # the last start was killed before it wrote the shorter file
        path.write_text(row_line({"step": 1}) + line)
        cut_rows_after(path, 1)
        assert path.read_text() == row_line({"step": 1})
    assert kept.read_text() == first + second


def test_without_rows_to_cut_nothing_is_written(path: Path) -> None:
    cut_rows_after(path, 2)
    assert not path.exists()
    path.write_text(row_line({"step": 2}))
    before = path.stat().st_ino
    cut_rows_after(path, 2)  # on a disk that may be full
    assert path.stat().st_ino == before
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_sync_puts_the_rows_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    file = MetricsFile(path)
    file.sync()
    assert flushed == [], "there is no row yet"
    file.append({"step": 1})
    assert flushed == [], "a step does not wait for the disk"
    file.sync()
    assert flushed == [str(path)]


def test_rows_that_a_full_disk_refused_are_written_whole_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, "8k"):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        rows = [{"step": step, "text": "x" * 3000} for step in (1, 2, 3, 4)]
        lines = [row_line(row) for row in rows]
        for row in rows:
            file.append(row)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
        with pytest.raises(OSError, match="No space left"):
            file.sync()
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        file.sync()
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_a_reader_that_follows_the_file_gets_each_row_once_and_only_when_it_is_whole(path: Path) -> None:
    reader = RowReader(path)
    assert reader.read() == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert steps(reader.read()) == [1]
    assert reader.read() == []
    with path.open("a") as file:
        file.write('}\nno row\n{"step": 3}\n')
    assert steps(reader.read()) == [2, 3]
    assert reader.read() == []
