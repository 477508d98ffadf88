"""A big JSON list, read entry by entry.

Real files have millions of entries and over a gigabyte. They are gone through once to find where every entry
lies; after that an entry is read and parsed when it is needed, so no process holds the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from alignkd.data.json_scan import WINDOW, IntArray, separators
from alignkd.errors import UserError, raise_if_passing

_SPACE = re.compile(r"[ \t\n\r]*")
_SPACES = b" \t\n\r"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonListFile:
    """Entries of a JSON list by byte range. Opens the file at its first use, in each process."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file: FileIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}

    def _open(self) -> FileIO:
        if self._file is None:
            try:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - stays open
            except OSError as error:
                raise_if_passing(error, self.path)
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return self._file

    def stat(self) -> os.stat_result:
        return os.fstat(self._open().fileno())

    def __len__(self) -> int:
        """Size in bytes."""
        return self.stat().st_size

    def sha256(self) -> str:
        file = self._open()
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()

    def entry(self, start: int, stop: int) -> Any:
        """The value in bytes [start, stop); the file is UTF-8."""
        return self.parsed(self.read(start, stop), start, stop)

    def read(self, start: int, stop: int) -> bytes:
        # Reading at a place of its own: loader workers that share the open file do not disturb each other.
        descriptor, parts = self._open().fileno(), []
        try:
            while start < stop and (part := os.pread(descriptor, stop - start, start)):
                parts.append(part)
                start += len(part)
        except OSError as error:
            raise_if_passing(error, self.path)
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return b"".join(parts)

    def parsed(self, raw: bytes, start: int, stop: int) -> Any:
        """The value in ``raw``, which are bytes [start, stop)."""
        try:
            return json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: bytes {start} to {stop}: not JSON in UTF-8 ({error})") from error

    def separators(self) -> IntArray:
        """Where the entries are separated (see ``json_scan``), for readers of whole parts of the file. What
        lies between has yet to be parsed. Raises UserError with line and column for what is no list."""
        size, mark = len(self), len(_BYTE_ORDER_MARK)
        skipped = mark if self.read(0, mark) == _BYTE_ORDER_MARK else 0
        starts = range(skipped, size, WINDOW)
        found = separators(self.read(start, min(start + WINDOW, size)) for start in starts)
        if found is not None:
            found += skipped
            first, last = int(found[0]), int(found[-1])
            around = self.read(skipped, first) + self.read(last + 1, size)
            ends = self.read(first, first + 1) + self.read(last, last + 1)
            entries = len(found) - 1
            if not around.strip(_SPACES) and ends == b"[]":
                # One region, and nothing in it: no entry.
                is_empty = entries == 1 and not self.read(first + 1, last).strip(_SPACES)
                return found[:1] if is_empty else found
        self.raise_syntax_error()
        raise AssertionError(f"{self.path}: brackets do not make a list, and yet it is JSON")

    def raise_syntax_error(self) -> None:
        """Raises UserError with line and column of what is no JSON, if there is such a place."""
        for _ in self.ranges():
            pass

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte range of each entry, in the file's order. Slow, and holds the whole file."""
        # One character per byte: positions in the text are then positions in the file. Strings with other
        # letters come out wrong here, and are only skipped over.
        text = self._read().decode("latin-1")
        mark = _BYTE_ORDER_MARK.decode("latin-1")
        at = self._skip(text, len(mark) if text.startswith(mark) else 0)
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

    def _read(self) -> bytes:
        file = self._open()
        file.seek(0)
        return file.readall()

    @staticmethod
    def _skip(text: str, at: int) -> int:
        match = _SPACE.match(text, at)
        assert match is not None
        return match.end()

    def _broken(self, message: str, text: str, at: int) -> UserError:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return UserError(f"{self.path}: not valid JSON at line {line}, column {column}: {message}")
