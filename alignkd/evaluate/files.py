"""JSON and JSON Lines as benchmarks publish them, gzipped or not, with the line in every error."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from alignkd.errors import UserError, raise_if_passing


class Row(NamedTuple):
    """One JSON object; ``where`` begins every error about it ("FILE: line 3")."""

    where: str
    value: dict[str, Any]

    def text(self, key: str) -> str:
        """The string at ``key``; raises UserError when there is none."""
        found = self.value.get(key)
        if not isinstance(found, str):
            raise UserError(f"{self.where}: `{key}` must be a text, found {found!r:.80}")
        return found

    def id(self, key: str) -> str:
        """The id at ``key`` as text: files of one benchmark mix texts and numbers."""
        return str(self.published_id(key))

    def published_id(self, key: str) -> str | int:
        """The id at ``key`` as the file has it; raises UserError if it is no text or whole number."""
        found = self.value.get(key)
        if isinstance(found, bool) or not isinstance(found, (str, int)):
            raise UserError(f"{self.where}: `{key}` must be a text or a whole number, found {found!r:.80}")
        return found


def read_text(path: Path) -> str:
    """UTF-8 text of ``path``, unpacked if its name ends in ``.gz``; raises UserError."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as packed:
                return packed.read()
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise_if_passing(error, path)
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_json_lines(path: Path) -> list[Row]:
    """One object per line; blank lines are skipped. Raises UserError for a broken line or an empty file."""
    rows = _rows_of(read_text(path), path)
    if not rows:
        raise UserError(f"{path}: is empty; expected one JSON object per line")
    return rows


def read_complete_lines(path: Path) -> list[Row]:
    """The same of a file that a process is writing or has not finished: what follows the last newline is
    left out, and the file may be empty or missing."""
    if not path.exists():
        return []
    text = read_text(path)
    return _rows_of(text[: text.rfind("\n") + 1], path)


def _rows_of(text: str, path: Path) -> list[Row]:
    rows = []
    # Not splitlines: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); every line must be one object") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: must be a JSON object, found {value!r:.80}")
        rows.append(Row(where, value))
    return rows
