"""Where the entries of a big JSON list are separated, found with numpy at the speed of memory.

Parsing a gigabyte of JSON takes a core half a minute; only who knows where entries begin can share that
work. Here only marks are looked at: quotes, backslashes, brackets and commas. What lies between two
separators is not checked: whoever parses it does that, and a list whose parts all parse is a JSON list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

WINDOW = 1 << 20  # bytes that are looked at in one go
_QUOTE, _BACKSLASH, _COMMA = b'"'[0], b"\\"[0], b","[0]
_DEPTH_STEP = np.zeros(256, dtype=np.int8)
_DEPTH_STEP[list(b"[{")] = 1
_DEPTH_STEP[list(b"]}")] = -1
_IS_MARK = bytes(byte in b'"\\,[]{}' for byte in range(256))  # for ``translate``: three times numpy's speed


class Marks(NamedTuple):
    """Brackets and commas outside strings."""

    at: IntArray  # byte of the file
    depth: IntArray  # brackets that are open after the mark
    is_comma: BoolArray


def separators(windows: Iterator[bytes]) -> IntArray | None:
    """Bytes of the list's opening bracket, of the commas between its entries, and of the closing bracket:
    entry n lies between elements n and n + 1. None when the brackets and strings do not make one list."""
    found: list[IntArray] = []
    depth, last = 0, -1
    for marks in _marks(windows):
        if len(marks.at) == 0:
            continue
        # Open from the first mark to the last one, and never again after it.
        if depth == 0 and (last >= 0 or marks.depth[0] != 1):
            return None
        closed = np.flatnonzero(marks.depth <= 0)
        if len(closed) and (closed[0] != len(marks.at) - 1 or marks.depth[-1] < 0):
            return None
        if depth == 0:
            found.append(marks.at[:1])
        found.append(marks.at[marks.is_comma & (marks.depth == 1)])
        depth, last = int(marks.depth[-1]), int(marks.at[-1])
    if depth != 0 or last < 0:
        return None
    return np.concatenate([*found, np.array([last])])


def _marks(windows: Iterator[bytes]) -> Iterator[Marks]:
    offset, in_string, depth, carried = 0, 0, 0, b""
    for read in windows:
        window = carried + read
        # Backslashes at the end belong to what follows them.
        carried = window[len(window.rstrip(b"\\")) :]
        window = window[: len(window) - len(carried)]
        data = np.frombuffer(window, dtype=np.uint8)
        at = np.flatnonzero(np.frombuffer(window.translate(_IS_MARK), dtype=np.bool_))
        kind = data[at]
        plain = ~_escaped(at, kind == _BACKSLASH)
        at, kind = at[plain], kind[plain]
        is_quote = kind == _QUOTE
        inside = np.cumsum(is_quote) + in_string & 1
        in_string = int(inside[-1]) if len(inside) else in_string
        outside = ~is_quote & (inside == 0)
        at, kind = at[outside], kind[outside]
        depths = np.cumsum(_DEPTH_STEP[kind], dtype=np.int64) + depth
        depth = int(depths[-1]) if len(depths) else depth
        yield Marks(at + offset, depths, kind == _COMMA)
        offset += len(window)
    if in_string or carried:
        # Not the end of a list; a mark that closes too much says so.
        yield Marks(np.array([offset]), np.array([-1]), np.array([False]))


def _escaped(at: IntArray, is_backslash: BoolArray) -> BoolArray:
    """Backslashes, and marks right behind an odd number of them."""
    escaped = is_backslash.copy()
    marks = np.flatnonzero(is_backslash)
    if len(marks):
        # Every other backslash of a run, from its first on, escapes what comes next.
        number = np.arange(len(marks))
        begins = np.diff(at[marks], prepend=-2) != 1
        in_run = number - np.maximum.accumulate(np.where(begins, number, 0))
        behind = marks[in_run % 2 == 0] + 1
        behind = behind[behind < len(at)]
        escaped[behind[at[behind] == at[behind - 1] + 1]] = True
    return escaped
