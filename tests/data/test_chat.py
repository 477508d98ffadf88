"""Chat templates: messages of turns, supervised characters, and templates that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from alignkd.data.chat import TemplateError, messages_of, render_supervised, shifted
from alignkd.data.records import Turn

END = "</s>"


def render(messages: list[dict[str, Any]], prompt: bool) -> str:
    """A template that only appends, with a newline behind the end token."""
    text = "BOS"
    for message in messages:
        content = "".join("<i>" if part["type"] == "image" else part["text"] for part in message["content"])
        text += f"[{message['role']}]{content}{END}\n"
    return text + ("[assistant]" if prompt else "")


def turns(*texts: str) -> list[Turn]:
    return [Turn("human" if number % 2 == 0 else "gpt", text) for number, text in enumerate(texts)]


def content(text: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = messages_of(turns(text))[0]["content"]
    return found


def test_the_only_image_comes_first() -> None:
    image = {"type": "image"}
    for text in ("<image>\nwhat", "what\n<image>", "<image> what"):
        assert content(text) == [image, {"type": "text", "text": "what"}]
    assert content("<image>") == [image]


def test_several_images_stay_where_they_are() -> None:
    image = {"type": "image"}
    parts = [{"type": "text", "text": "a "}, image, image, {"type": "text", "text": " b"}]
    assert content("a <image><image> b") == parts


def test_a_marker_in_an_answer_is_text() -> None:
    answer = messages_of(turns("q", "<image> is a tag"))[1]
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "<image> is a tag"}]}


def test_every_answer_is_supervised_up_to_its_end_token() -> None:
    rendered = render_supervised(messages_of(turns("q", "one", "r", "two words")), render, [END])
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == ["one</s>", "two words</s>"]


def test_a_template_that_writes_the_last_turn_differently_is_refused() -> None:
    def last_differs(messages: list[dict[str, Any]], prompt: bool) -> str:
        return render(messages, prompt).replace("]one", "]1" if len(messages) > 2 else "]one")

    one = render_supervised(messages_of(turns("q", "one")), last_differs, [END])
    assert one.text[slice(*one.answers[0])] == "one</s>"
    with pytest.raises(TemplateError, match="differently when another follows"):
        render_supervised(messages_of(turns("q", "one", "r", "two")), last_differs, [END])


def test_a_template_that_drops_earlier_answers_is_refused() -> None:
    def without_thoughts(messages: list[dict[str, Any]], prompt: bool) -> str:
        return render(messages[-2:], prompt)

    with pytest.raises(TemplateError, match="cannot be told apart"):
        render_supervised(messages_of(turns("q", "one", "r", "two")), without_thoughts, [END])


def test_a_template_without_an_end_token_is_refused() -> None:
    def endless(messages: list[dict[str, Any]], prompt: bool) -> str:
        return render(messages, prompt).replace(END, "")

    with pytest.raises(TemplateError, match="learn to stop"):
        render_supervised(messages_of(turns("q", "one")), endless, [END])


def test_positions_move_behind_what_was_replaced() -> None:
    replaced = [((2, 3), (2, 12)), ((5, 6), (14, 34))]
    assert [shifted(position, replaced) for position in (0, 2, 3, 5, 6, 9)] == [0, 2, 12, 14, 34, 37]
