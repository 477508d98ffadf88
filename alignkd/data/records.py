"""Turns an entry of a LLaVA-style JSON list into a checked ``Sample``.

An entry is ``{"id", "image" (optional: a path or a list of paths), "conversations": [{"from", "value"}]}``,
where ``from`` is ``human`` or ``gpt``. Files come from others, so nothing in an entry is trusted.
"""

from __future__ import annotations

import os.path
from typing import Any, Literal, NamedTuple

from alignkd.errors import UserError

IMAGE_MARKER = "<image>"
Speaker = Literal["human", "gpt"]
_SPEAKERS = ("human", "gpt")


# Named tuples here and in ``templates``: millions are created, and frozen dataclasses take twice as long.
class Turn(NamedTuple):
    speaker: Speaker
    text: str


class Sample(NamedTuple):
    source: int  # number of the data source, in the order of the configuration
    entry: int  # number of the entry in its file, from 0
    id: str
    images: tuple[str, ...]  # relative to the source's image folder
    turns: tuple[Turn, ...]  # human and gpt alternate, starting with human


class BadSample(UserError):
    """An unusable sample. ``reason`` is a short category, used for counting."""

    def __init__(self, file: str, entry: int, sample_id: str | None, reason: str, detail: str = "") -> None:
        self.reason = reason
        self._given = (file, entry, sample_id, reason, detail)
        name = f"entry {entry}" if sample_id is None else f"entry {entry} (id {sample_id!r:.80})"
        super().__init__(f"{file}: {name}: {reason}" + (f": {detail}" if detail else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # so that it can be raised in another process


class _Problem(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail


def parse_sample(value: Any, file: str, source: int, entry: int) -> Sample:
    """Check one entry of ``file``; raises :class:`BadSample`."""
    sample_id = _id_of(value, entry)
    try:
        if not isinstance(value, dict):
            raise _Problem("not an object", f"found {type(value).__name__}")
        images = _images_of(value.get("image"))
        turns = _turns_of(value.get("conversations"))
        markers = 0
        for _, question in turns[::2]:
            markers += question.count(IMAGE_MARKER)
        if markers != len(images):
            raise _Problem(
                "markers do not match images",
                f"{markers} {IMAGE_MARKER} in the questions, {len(images)} image files",
            )
    except _Problem as problem:
        raise BadSample(file, entry, sample_id, problem.reason, problem.detail) from None
    return Sample(source, entry, sample_id if sample_id is not None else str(entry), images, turns)


def _id_of(value: Any, entry: int) -> str | None:
    found = value.get("id") if isinstance(value, dict) else None
    if isinstance(found, (str, int)):
        name = str(found)
        return name if name.isascii() else name.encode(errors="replace").decode()
    return None


def _images_of(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise _Problem("bad image path", f"{path!r:.80} is not a file name")
        if os.path.isabs(path):
            raise _Problem("image path is absolute", f"{path!r:.200}, not relative to the image folder")
        if os.pardir in path and os.path.normpath(path).split(os.sep)[0] == os.pardir:
            raise _Problem("image path leaves the image folder", f"{path!r:.200}")
    return tuple(paths)


def _turns_of(value: Any) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise _Problem("no conversation", "'conversations' must be a list of turns")
    turns = tuple([_turn_of(turn, number) for number, turn in enumerate(value)])
    for number, (speaker, text) in enumerate(turns):
        if speaker != _SPEAKERS[number % 2]:
            found = f"turn {number} is {speaker!r}"
            if number == 0:
                raise _Problem("first turn is not human", found)
            raise _Problem("turns do not alternate", found)
        if not text and speaker == "gpt":
            raise _Problem("empty answer", f"turn {number}")
    if speaker != "gpt":
        raise _Problem("last turn is not an answer", f"turn {len(turns) - 1} is 'human'")
    return turns


def _turn_of(value: Any, number: int) -> Turn:
    if not isinstance(value, dict):
        raise _Problem("turn is not an object", f"turn {number}")
    speaker, text = value.get("from"), value.get("value")
    if speaker not in _SPEAKERS:
        raise _Problem("unknown speaker", f"turn {number} is from {speaker!r:.80}, valid: human, gpt")
    if not isinstance(text, str) or not _is_unicode(text):
        raise _Problem("turn has no text", f"'value' of turn {number} is not a Unicode string")
    return Turn(speaker, text)


def _is_unicode(text: str) -> bool:
    """JSON can contain lone surrogates, which no tokenizer or file system accepts."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
