"""``metrics.jsonl``: one JSON object per optimizer step, appended by rank 0. A killed writer may tear the
last line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from alignkd.run_folder.durable_files import flush_to_disk, replace_text
from alignkd.run_folder.paths import RunPaths

log = logging.getLogger(__name__)


def whole_rows(run: Path) -> list[dict[str, Any]]:
    """In file order, without lines that are not JSON objects; empty when the file cannot be read."""
    try:
        lines = RunPaths(run).metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


class MetricsFile:
    """The writer's side of the file. Rows that a full disk refuses are kept and written with later ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []

    def drop_rows_after(self, step: int) -> None:
        """Drop the rows after ``step``, from which training resumes and writes them again. Raises OSError."""
        if not self._path.exists():
            return
        before = self._path.read_text(encoding="utf-8", errors="replace")  # a power failure leaves any bytes
        after = "".join(line + "\n" for line in before.splitlines() if _step_of(line) <= step)
        if after != before:
            replace_text(self._path, after)

    def append(self, row: dict[str, Any]) -> None:
        """Does not raise when the disk refuses the row: the next save reports what is wrong."""
        self._unwritten.append(json_line(row))
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


def json_line(row: dict[str, Any]) -> str:
    """One line of the file. Infinity and NaN, which JSON does not have, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62  # a line torn by a killed writer
