"""``metrics.jsonl``: one JSON object (a row) per line and optimizer step. Rank 0 appends, everyone reads.

A killed writer or a full disk may leave a torn line, a power failure anything: readers skip what is no row.
JSON has neither infinity nor NaN: they are written as null, so a reader may find null for any number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import flush_to_disk, write_bytes_atomic

log = logging.getLogger(__name__)
Row = dict[str, Any]
ACCURACY_COLUMN = "evaluation_accuracy"  # only of rows after which ``evaluation.task`` was answered
# Begins the columns with the weights in use, where ``distillation.balance`` is not fixed.
WEIGHT_OF = "weight_of_"
_TAIL_BYTES_PER_ROW = 4096  # generous: rows take about 700 bytes


def row_line(row: Row) -> str:
    """The line of ``row``, with its line break."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def iter_rows(path: Path) -> Iterator[Row]:
    """All rows in the order of the file; none when it cannot be read."""
    try:
        with path.open("rb") as file:
            yield from _rows(file)
    except OSError:
        return


def last_rows(path: Path, count: int) -> list[Row]:
    """At most ``count`` rows from the end of the file, without reading all of it."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - count * _TAIL_BYTES_PER_ROW)
            file.seek(start)
            lines = file.read().splitlines()
    except OSError:
        return []
    return list(_rows(lines[1 if start else 0 :]))[-count:]


def weights_of_row(row: Row) -> dict[str, float]:
    """Weights of the loss terms in that step; empty where they are those of the configuration."""
    return {
        name.removeprefix(WEIGHT_OF): float(value)
        for name, value in row.items()
        if name.startswith(WEIGHT_OF) and isinstance(value, int | float)
    }


def cut_rows_after(path: Path, step: int) -> None:
    """Move the rows of steps after ``step``, and torn lines, to the end of ``metrics.jsonl.after-step-N``
    beside it; nothing is written when there are none. Raises OSError."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    stays = b"".join(line + b"\n" for line in lines if _step(line) <= step)
    cut = b"".join(line + b"\n" for line in lines if _step(line) > step)
    if not cut and path.read_bytes() == stays:
        return
    if cut:
        beside = path.with_name(f"{path.name}.after-step-{step}")
        kept = beside.read_bytes() if beside.exists() else b""
        if not kept.endswith(cut):  # else a start was killed between these two writes
            write_bytes_atomic(beside, kept + cut)
            log.info("rows after step %d are kept in %s", step, beside)
    # Durable: a resume does not repeat the steps whose rows a checkpoint vouches for.
    write_bytes_atomic(path, stays)


class RowReader:
    """Follows the file while another process appends to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Row]:
        """Rows that were completed since the last call; none while there is no file. Raises OSError."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(whole)
        return list(_rows(whole.splitlines()))


class MetricsFile:
    """What rank 0 appends to the file. Rows that a full disk refuses are kept and written with later ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def append(self, row: Row) -> None:
        """Does not raise when the disk refuses the row: the next save reports what is wrong."""
        self._unwritten.append(row_line(row))
        try:
            self._write_rows()
        except OSError as error:
            log.warning("%s: %s", self._path, error)

    def sync(self) -> None:
        """Put all rows on the disk, so that a checkpoint may be committed: a resume does not repeat the steps
        before it. Raises OSError."""
        if self._unwritten or self._path.exists():
            self._write_rows()
            flush_to_disk(self._path)

    def _write_rows(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)  # else the next row would be appended to half a row
            raise
        self._unwritten = []


def _rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for line in lines:
        try:
            row = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _step(line: bytes) -> float:
    """Infinity for what is no row of a step."""
    row = next(_rows([line]), {})
    step = row.get("step")
    return step if isinstance(step, int) else math.inf
