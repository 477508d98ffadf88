"""A big JSON list, read entry by entry.

Real files have millions of entries and over a gigabyte. They are parsed once to find where every entry lies;
after that an entry is parsed when it is needed, from a memory map that all processes of a node share.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkd.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonListFile:
    """Entries of a JSON list by byte range. Opens the file at its first use, in each process."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_map": None}

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            try:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise UserError(f"{self.path}: cannot be read ({error})") from error
        return self._map

    def __len__(self) -> int:
        """Size in bytes."""
        return len(self._bytes())

    def sha256(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()

    def entry(self, start: int, stop: int) -> Any:
        """The value in bytes [start, stop); the file is UTF-8."""
        try:
            return json.loads(self._bytes()[start:stop].decode())
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: bytes {start} to {stop} are not JSON in UTF-8 ({error})"
            ) from error

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte range of each entry, in the file's order."""
        raw = self._bytes()
        # One character per byte: positions in the text are then positions in the file. Strings with other
        # letters come out wrong here, and are only skipped over.
        text = raw[:].decode("latin-1")
        at = self._skip(text, len(_BYTE_ORDER_MARK) if raw[:3] == _BYTE_ORDER_MARK else 0)
        if text[at : at + 1] != "[":
            raise UserError(
                f"{self.path}: must be a JSON list of entries, begins with {text[at : at + 20]!r}"
            )
        at = self._skip(text, at + 1)
        scan = json.JSONDecoder().raw_decode
        while text[at : at + 1] != "]":
            try:
                _, stop = scan(text, at)
            except json.JSONDecodeError as error:
                raise self._broken(error.msg, text, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._broken(str(error), text, at) from error
            yield at, stop
            at = self._skip(text, stop)
            if text[at : at + 1] == ",":
                at = self._skip(text, at + 1)
                if text[at : at + 1] == "]":
                    raise self._broken("Expecting value", text, at)
            elif text[at : at + 1] != "]":
                raise self._broken("Expecting ',' or ']'", text, at)
        if (at := self._skip(text, at + 1)) != len(text):
            raise self._broken("Extra data after the list", text, at)

    @staticmethod
    def _skip(text: str, at: int) -> int:
        match = _SPACE.match(text, at)
        assert match is not None
        return match.end()

    def _broken(self, message: str, text: str, at: int) -> UserError:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return UserError(f"{self.path}: not valid JSON at line {line}, column {column}: {message}")
