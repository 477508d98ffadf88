from __future__ import annotations

import pytest

from alignkd.data.records import BadSample, Sample, Turn, parse_sample
from alignkd.errors import UserError
from tests.data.records import entry

HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}


def test_a_valid_entry_is_parsed():
    value = entry("<image>\nleft, <image> right?", image=["a.png", "sub/b.png"], id=7)
    assert parse_sample(value, "f.json", 2, 5) == Sample(
        source=2,
        entry=5,
        id="7",
        images=("a.png", "sub/b.png"),
        turns=(Turn("human", "<image>\nleft, <image> right?"), Turn("gpt", "a red circle")),
    )


def test_an_entry_without_an_id_is_named_by_its_number():
    assert parse_sample({"conversations": [HUMAN, GPT]}, "f", 0, 12).id == "12"


def test_a_marker_in_an_answer_is_text():
    assert parse_sample(entry(answer="write <image> there"), "f", 0, 0).images == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "not an object"),
        ({"id": "x"}, "no conversation"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": {"from": "human"}}, "no conversation"),
        ({"conversations": ["hello", GPT]}, "turn is not an object"),
        ({"conversations": [{"from": "system", "value": "s"}, GPT]}, "unknown speaker"),
        ({"conversations": [{"from": ["human"], "value": "s"}, GPT]}, "unknown speaker"),
        ({"conversations": [GPT, HUMAN]}, "first turn is not human"),
        ({"conversations": [HUMAN, HUMAN, GPT]}, "turns do not alternate"),
        ({"conversations": [HUMAN, GPT, GPT]}, "turns do not alternate"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "last turn is not an answer"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, "empty answer"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "turn has no text"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}]}, "turn has no text"),
        (entry("<image>"), "markers do not match images"),
        (entry(image="a.png"), "markers do not match images"),
        (entry("<image>", image=["a.png", "b.png"]), "markers do not match images"),
        (entry("q", "<image>", image="a.png"), "markers do not match images"),
        (entry("<image>", image=""), "bad image path"),
        (entry("<image>", image={"path": "a.png"}), "bad image path"),
        (entry("<image>", image="a\0.png"), "bad image path"),
        (entry("<image>", image="/etc/a.png"), "image path is absolute"),
        (entry("<image>", image=".."), "image path leaves the image folder"),
        (entry("<image>", image="../a.png"), "image path leaves the image folder"),
        (entry("<image>", image="sub/../../a.png"), "image path leaves the image folder"),
    ],
)
def test_a_bad_entry_is_named_with_its_reason(value, reason):
    with pytest.raises(BadSample) as caught:
        parse_sample(value, "folder/data.json", 0, 41)
    assert isinstance(caught.value, UserError)
    assert caught.value.reason == reason
    assert str(caught.value).startswith("folder/data.json: entry 41")
    assert reason in str(caught.value)


def test_the_id_is_in_the_message():
    with pytest.raises(BadSample, match=r"entry 3 \(id 'abc'\): markers"):
        parse_sample(entry("<image>", id="abc"), "f", 0, 3)


def test_dots_that_stay_inside_the_folder_are_allowed():
    assert parse_sample(entry("<image>", image="sub/../a..png"), "f", 0, 0).images == ("sub/../a..png",)


def image(**more: object) -> dict[str, object]:
    return {"type": "image", **more}


def words(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def messages(*contents: object, images: object = None, system: object = None) -> dict[str, object]:
    roles = ("user", "assistant")
    found = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    if system is not None:
        found.insert(0, {"role": "system", "content": system})
    return {"id": 7, "messages": found} | ({} if images is None else {"images": images})


def test_messages_are_the_same_sample_as_conversations() -> None:
    ours = parse_sample(entry("<image>what", "red", image="a.png", id=7), "f", 0, 3)
    for given in (
        messages([image(image="a.png"), words("what")], "red"),
        messages([image(path="a.png"), words("what")], [words("red")]),
        messages([image(), words("what")], "red", images=["a.png"]),
    ):
        assert parse_sample(given, "f", 0, 3) == ours


def test_images_of_messages_are_taken_in_order() -> None:
    sample = parse_sample(
        messages(
            [image(), words("or"), image(image="b.png")],
            "yes",
            [words("and "), image()],
            "no",
            images=["a.png", "c.png"],
        ),
        "f",
        0,
        0,
    )
    assert sample.images == ("a.png", "b.png", "c.png")
    assert [turn.text for turn in sample.turns] == ["<image>or<image>", "yes", "and <image>", "no"]


def test_a_system_message_is_kept_apart() -> None:
    sample = parse_sample(messages("q", "a", system="be short"), "f", 0, 0)
    assert sample.system == "be short"
    assert [turn.text for turn in sample.turns] == ["q", "a"]
    assert parse_sample(entry(), "f", 0, 0).system == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"messages": []}, "no conversation"),
        (messages("q"), "last turn is not an answer"),
        (messages("q", ""), "empty answer"),
        (messages([image()], "a"), "missing image path"),
        (messages("q", "a", images=["x.png"]), "markers do not match images"),
        (messages([image(image="/etc/x.png")], "a"), "image path is absolute"),
        (messages([image(image="../x.png")], "a"), "image path leaves the image folder"),
        (messages([image(image=3)], "a"), "bad image path"),
        (messages("a <image> here", "a"), "marker in text"),
        (messages([{"type": "video"}], "a"), "unknown content"),
        (messages(3, "a"), "message has no content"),
        ({"messages": ["q"]}, "message has no content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown speaker"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown speaker"),
        (messages("q", [image(image="x.png")]), "markers do not match images"),
    ],
)
def test_a_bad_message_has_a_reason(given: dict[str, object], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse_sample(given, "f", 0, 0)
    assert caught.value.reason == reason
