from __future__ import annotations

from typing import Any

import pytest

from alignkd.config.dotted import did_you_mean, flatten, get_value, join_keys, set_value, split_key


def document() -> dict[str, Any]:
    return {"a": {"b": 1, "empty": None}, "list": [{"x": 1}, {"x": 2}], "text": "word"}


def test_a_dotted_key_is_split_and_joined() -> None:
    assert split_key("data.sources.0.file") == ("data", "sources", 0, "file")
    assert split_key("a..b") == ("a", "", "b")
    assert join_keys(("data", "sources", 0, "file")) == "data.sources[0].file"
    assert join_keys(()) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a.b", 1),
        ("list.1.x", 2),
        ("a.empty", None),
        ("a.c", "?"),
        ("list.2", "?"),
        ("text.b.c", "?"),
        ("a.0", "?"),
    ],
)
def test_a_value_is_found_or_the_default_is_given(key: str, value: object) -> None:
    assert get_value(document(), split_key(key), "?") == value


@pytest.mark.parametrize("key", ["a.b", "a.new", "a.empty.deeper", "new.section.key", "list.1.x", "list.0"])
def test_a_value_is_written_and_missing_sections_are_created(key: str) -> None:
    changed = document()
    assert set_value(changed, split_key(key), 9)
    assert get_value(changed, split_key(key)) == 9
    assert changed["text"] == "word"


@pytest.mark.parametrize("key", ["text.b", "a.b.c", "list.2", "list.2.x", "list.x", "a.0", "text.0"])
def test_nothing_is_written_where_nothing_could_hold_the_key(key: str) -> None:
    changed = document()
    assert not set_value(changed, split_key(key), 9)
    assert changed == document()


def test_flattened_lists_stay_whole() -> None:
    assert flatten(document()) == {
        "a.b": 1,
        "a.empty": None,
        "list": [{"x": 1}, {"x": 2}],
        "text": "word",
    }


def test_only_a_close_word_is_suggested() -> None:
    assert did_you_mean("pretrian", ["finetune", "pretrain"]) == "; did you mean pretrain?"
    assert did_you_mean("xyzzy", ["finetune", "pretrain"]) == ""
