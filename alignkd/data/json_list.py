"""A big JSON list, read entry by entry.

Real files have millions of entries and over a gigabyte. They are parsed once to find where every entry lies;
after that an entry is read and parsed when it is needed, so no process holds the file.
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

from alignkd.errors import UserError, raise_if_passing

_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = "\xef\xbb\xbf"


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

    def __len__(self) -> int:
        """Size in bytes."""
        return os.fstat(self._open().fileno()).st_size

    def sha256(self) -> str:
        file = self._open()
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()

    def entry(self, start: int, stop: int) -> Any:
        """The value in bytes [start, stop); the file is UTF-8."""
        # Reading at a place of its own: loader workers that share the open file do not disturb each other.
        raw = os.pread(self._open().fileno(), stop - start, start)
        try:
            return json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: bytes {start} to {stop}: not JSON in UTF-8 ({error})") from error

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Byte range of each entry, in the file's order."""
        # One character per byte: positions in the text are then positions in the file. Strings with other
        # letters come out wrong here, and are only skipped over.
        text = self._read().decode("latin-1")
        at = self._skip(text, len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0)
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
