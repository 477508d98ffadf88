"""Reads a large JSON list, or JSON Lines, entry by entry.

Real files have millions of entries and more than a gigabyte. They are parsed once, window by window, to
find the byte range of every entry. Later an entry is read and parsed when it is needed, so no process holds
the file.
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

from alignkd.errors import FileSystemError, UserError, raise_if_passing

WINDOW = 1 << 20  # bytes per read
_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_WORD = 16  # characters before the end of a window that may belong to a word that is cut there


class JsonListFile:
    """Entries of a JSON list by byte range. Each process opens the file at its first use."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._file: FileIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_file": None}

    def _open(self) -> FileIO:
        if self._file is None:
            try:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - it stays open
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
        """The value in bytes [start, stop) of the file, which is UTF-8."""
        return self.parsed(self.read(start, stop), start, stop)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the file."""
        # Without a shared file position: loader workers that inherit the open file do not disturb each other.
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
        """The value in ``raw``, the bytes [start, stop) of the file."""
        try:
            return json.loads(raw.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: bytes {start} to {stop}: not JSON in UTF-8 ({error})") from error

    def parsed_again(self, raw: bytes, start: int, stop: int) -> Any:
        """As :meth:`parsed`, of an entry whose syntax :meth:`ranges` has seen to be right. Raises
        FileSystemError when it no longer is: a file server that failed, or a file that is being replaced."""
        try:
            return json.loads(raw.decode())
        except json.JSONDecodeError as error:
            raise FileSystemError(
                f"{self.path}: bytes {start} to {stop} read twice were not the same; try again"
            ) from error
        except (ValueError, RecursionError):
            return self.parsed(raw, start, stop)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The byte range of each entry, in order. Raises UserError with line and column if this is neither a
        JSON list nor JSON Lines. Whether texts are UTF-8 is only known once an entry is parsed."""
        window = _Window(self)
        if window.next_character() == "{":  # JSON Lines; nothing depends on where a line ends
            while window.next_character():
                yield window.take_value()
            return
        if window.next_character() != "[":
            begin = window.text[window.at : window.at + 20]
            raise UserError(
                f"{self.path}: must be a JSON list of entries or JSON Lines, begins with {begin!r}"
            )
        window.at += 1
        if window.next_character() != "]":
            yield window.take_value()
            while (character := window.next_character()) == ",":
                window.at += 1
                window.next_character()
                yield window.take_value()
            if character != "]":
                raise window.broken("Expecting ',' or ']'", window.at)
        window.at += 1
        if window.next_character():
            raise window.broken("Extra data after the list", window.at)


class _Window:
    """A part of a file that moves forward as it is read.

    ``text`` has one character per byte, so that positions in it are positions in the file. Texts that are
    not ASCII are decoded wrongly, which does not matter, since they are only skipped. ``at`` is the next
    character.
    """

    def __init__(self, file: JsonListFile) -> None:
        self._file = file
        self._start = len(_BYTE_ORDER_MARK) if file.read(0, len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        self._scan = json.JSONDecoder().raw_decode
        self.text = ""
        self.at = 0

    def next_character(self) -> str:
        """The next character that is not white space, without consuming it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def take_value(self) -> tuple[int, int]:
        """The byte range of the JSON value that starts here."""
        while True:
            try:
                _, stop = self._scan(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - _LONGEST_WORD or error.msg.startswith("Unterminated")
                if is_cut and self._grow():
                    continue
                raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number or nesting beyond Python's limits
                raise self.broken(str(error), self.at) from error
            if stop > len(self.text) - _LONGEST_WORD and self._grow():
                continue  # a number may continue: 2.5 is one, and so is 2.5e-3
            found = self._start + self.at, self._start + stop
            self.at = stop
            return found

    def _grow(self) -> bool:
        """Drop what has been consumed, and read at least as much as is left; False at the end of the file."""
        rest = self.text[self.at :]
        begin = self._start + len(self.text)
        more = self._file.read(begin, begin + max(WINDOW, len(rest)))
        if more:
            self._start += self.at
            self.text, self.at = rest + more.decode("latin-1"), 0
        return bool(more)

    def broken(self, message: str, at: int) -> UserError:
        """The error at position ``at`` of ``text``."""
        place = self._start + at
        line, line_start = 1, 0
        for begin in range(0, place, WINDOW):
            part = self._file.read(begin, min(begin + WINDOW, place))
            line += part.count(b"\n")
            if b"\n" in part:
                line_start = begin + part.rindex(b"\n") + 1
        column = place - line_start + 1
        return UserError(f"{self._file.path}: not valid JSON at line {line}, column {column}: {message}")
