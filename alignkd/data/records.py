"""Turns an entry of a data file into a checked ``Sample``.

A LLaVA-style entry is ``{"id", "image" (optional: a path or a list of paths), "conversations": [{"from",
"value"}]}``, where ``from`` is ``human`` or ``gpt``. One in the messages format is ``{"messages": [{"role",
"content"}], "images" (optional)}``, where ``role`` is ``user``, ``assistant`` or, first, ``system``, and
``content`` a text or a list of ``{"type": "text", "text"}`` and ``{"type": "image", "image" (optional: a
path)}``; images without a path of their own are those of ``images``, in order. Files come from others, so
nothing in an entry is trusted.
"""

from __future__ import annotations

import os.path
from typing import Any, Literal, NamedTuple

from alignkd.errors import UserError

IMAGE_MARKER = "<image>"
Speaker = Literal["human", "gpt"]
_SPEAKERS = ("human", "gpt")
_SPEAKER_OF_ROLE = {"user": "human", "assistant": "gpt"}


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
    system: str = ""  # what a system message says before the first turn


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
        system = ""
        if "messages" in value:
            images, turns, system = _messages_of(value["messages"], value.get("images"))
        else:
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
    return Sample(source, entry, sample_id if sample_id is not None else str(entry), images, turns, system)


def _messages_of(messages: Any, images: Any) -> tuple[tuple[str, ...], tuple[Turn, ...], str]:
    """(images, turns, system message) of the messages format."""
    if not isinstance(messages, list) or not messages:
        raise _Problem("no conversation", "'messages' must be a list of messages")
    system = ""
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system = "".join(part for part in _parts_of(messages[0], 0) if isinstance(part, str))
        messages = messages[1:]
    listed = list(_images_of(images))
    found: list[str] = []
    conversation = []
    for number, message in enumerate(messages):
        text = ""
        for part in _parts_of(message, number):
            if isinstance(part, str):
                text += part
                continue
            if part.path is None and not listed:
                raise _Problem(
                    "missing image path", f"message {number} has an image, and 'images' none for it"
                )
            found.append(listed.pop(0) if part.path is None else part.path)
            text += IMAGE_MARKER
        role = message.get("role")
        speaker = _SPEAKER_OF_ROLE.get(role, role) if isinstance(role, str) else role
        conversation.append({"from": speaker, "value": text})
    if listed:
        raise _Problem("markers do not match images", f"{len(listed)} of 'images' are in no message")
    return _images_of(found), _turns_of(conversation), system


class _ImagePart(NamedTuple):
    path: str | None


def _parts_of(message: Any, number: int) -> list[str | _ImagePart]:
    """The texts and images of a message. A text with an image's marker is refused: it is not one."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _Problem("message has no content", f"'content' of message {number} is no text and no list")
    parts: list[str | _ImagePart] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_MARKER in part["text"]:
                raise _Problem("marker in text", f"message {number} contains {IMAGE_MARKER} as text")
            parts.append(part["text"])
        elif kind == "image":
            parts.append(_ImagePart(part.get("image", part.get("path"))))
        else:
            raise _Problem("unknown content", f"message {number}: {part!s:.80}; valid types: text, image")
    return parts


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
