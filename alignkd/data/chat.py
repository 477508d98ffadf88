"""A conversation through a model's own chat template, and which of its characters are supervised.

Answers are found by the difference of prefixes: what the template adds to the conversation so far, generation
prompt included, when the answer is known. That works for any template that only appends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from alignkd.data.records import IMAGE_MARKER, Turn

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]  # messages, with a generation prompt?
ROLES = {"human": "user", "gpt": "assistant"}


class TemplateError(ValueError):
    """A chat template that supervision cannot be derived from."""


class Rendered(NamedTuple):
    text: str
    answers: tuple[tuple[int, int], ...]  # characters [start, stop), the end token included


def messages_of(turns: Sequence[Turn], system: str = "") -> list[Message]:
    """Turns as chat templates take them. The only image of a turn comes first, as in the authors' templates;
    several stay where they are."""
    first = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return first + [{"role": ROLES[speaker], "content": _content(speaker, text)} for speaker, text in turns]


def _content(speaker: str, text: str) -> list[dict[str, str]]:
    parts = text.split(IMAGE_MARKER) if speaker == "human" else [text]
    if len(parts) == 2:
        parts = ["", "".join(parts).strip()]
    content: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        if number:
            content.append({"type": "image"})
        if part:
            content.append({"type": "text", "text": part})
    return content


def render_supervised(messages: list[Message], render: Render, end_tokens: Sequence[str]) -> Rendered:
    """Raises TemplateError for a template that does not only append, or does not end an answer."""
    text = render(messages, False)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], True)
        after = render(messages[: number + 1], False)
        if not after.startswith(before) or not text.startswith(after):
            raise TemplateError(
                "the chat template writes a turn differently when another follows, or without the generation "
                "prompt, so the answers in its text cannot be told apart"
            )
        answer = after[len(before) :].rstrip()  # many write a newline behind the end token
        if not answer.endswith(tuple(end_tokens)):
            raise TemplateError(
                "the chat template does not end an answer with a special token, so the student would not "
                "learn to stop"
            )
        answers.append((len(before), len(before) + len(answer)))
    return Rendered(text, tuple(answers))


def shifted(position: int, replaced: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """The position in a text after (old span, new span) were replaced in it; it is in none of them."""
    shift = 0
    for (_, old_stop), (_, new_stop) in replaced:
        if old_stop <= position:
            shift = new_stop - old_stop
    return position + shift
