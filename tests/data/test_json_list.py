from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from pathlib import Path

import pytest

from alignkd.data import json_list
from alignkd.data.json_list import JsonListFile
from alignkd.errors import UserError

ENTRIES = [{"id": "Größe, 大 😀", "b": [1, 2, {"c": "]},{"}]}, 'text \\ " ,', 3.5, None, [], {"x": "é"}]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_entries_are_found_by_byte_range(tmp_path, ascii_only, indent, mark):
    path = tmp_path / "data.json"
    path.write_bytes(mark + json.dumps(ENTRIES, ensure_ascii=ascii_only, indent=indent).encode() + b"\n ")
    file = JsonListFile(path)
    ranges = list(file.ranges())
    assert [file.entry(*byte_range) for byte_range in ranges] == ENTRIES
    copy = pickle.loads(pickle.dumps(file))
    assert copy.entry(*ranges[0]) == ENTRIES[0]


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_json_lines_are_found_by_byte_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, between: str, end: str
) -> None:
    monkeypatch.setattr(json_list, "WINDOW", window)
    entries = [{"id": "Größe, 大 😀", "b": [1, {"c": "}{\n"}]}, {}, {"x": "é", "y": 2.5}]
    lines = between.join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "data.jsonl").write_text(lines + end, encoding="utf-8")
    file = JsonListFile(tmp_path / "data.jsonl")
    assert [file.entry(*byte_range) for byte_range in file.ranges()] == entries


def test_an_empty_list_has_no_entries(tmp_path):
    (tmp_path / "data.json").write_text(" [ ] ")
    assert list(JsonListFile(tmp_path / "data.json").ranges()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a JSON list"),
        ('"a": 1', "must be a JSON list"),
        ('{"a": 1}\n{"b"', r"line 2, column 5: Expecting ':' delimiter"),
        ('[{"a": 1}', "line 1, column 10: Expecting ',' or ']'"),
        ('[{"a": 1},\n {"a": }]', r"line 2, column 8: Expecting value"),
        ("[1, 2,]", "column 7: Expecting value"),
        ("[1 2]", "column 4: Expecting ',' or ']'"),
        ("[1] 2", "Extra data"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(JsonListFile(path).ranges())
    assert str(path) in str(caught.value)


def test_text_in_another_encoding_is_an_error(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes('["é"]'.encode("latin-1"))
    file = JsonListFile(path)
    with pytest.raises(UserError, match="not JSON in UTF-8"):
        file.entry(*next(file.ranges()))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read"):
        len(JsonListFile(tmp_path / "nothing.json"))


PIECES = ['"', "\\", "\\\\", '\\"', "[", "]", "{", "}", ",", "é", "大", " ", "\n", "a", "\\u005c", ":"]


def random_value(pick: random.Random, depth: int = 0) -> object:
    kind = pick.randrange(6 if depth < 4 else 3)
    if kind < 2:
        return "".join(pick.choices(PIECES, k=pick.randrange(9)))
    if kind == 2:
        return pick.choice([None, True, False, 1, 123456789012, -2.5e-3, float("-inf"), float("nan")])
    if kind == 3:
        return [random_value(pick, depth + 1) for _ in range(pick.randrange(4))]
    return {str(random_value(pick, 9)): random_value(pick, depth + 1) for _ in range(pick.randrange(4))}


@pytest.mark.parametrize("window", [1, 2, 7, 64, 1 << 20])
def test_windows_cut_the_file_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(json_list, "WINDOW", window)
    pick = random.Random(window)
    for turn in range(60):
        entries = [random_value(pick) for _ in range(pick.randrange(6))]
        text = json.dumps(entries, ensure_ascii=turn % 2 == 0, indent=pick.choice([None, 1]))
        path = tmp_path / "data.json"
        path.write_bytes((b"\xef\xbb\xbf" if turn % 3 == 0 else b" ") + text.encode() + b" \n")
        file = JsonListFile(path)
        found = [file.entry(*byte_range) for byte_range in file.ranges()]
        assert repr(found) == repr(entries)  # NaN is not equal to itself


@pytest.mark.parametrize("window", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}]",
        "{} {",
        "[",
        "]",
        "[1]]",
        "[[1]",
        '["a]',
        "[1] [2]",
        "[1}",
        '["\\',
        "[1]x",
        "x[1]",
        "[1],",
        "[tru]",
    ],
)
def test_what_is_not_a_list_is_named_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, window: int
) -> None:
    monkeypatch.setattr(json_list, "WINDOW", window)
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json: (not valid JSON at line 1|must be a JSON list)"):
        list(JsonListFile(tmp_path / "data.json").ranges())


@pytest.mark.parametrize("window", [1, 10, 1 << 20])
def test_line_and_column_do_not_depend_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(json_list, "WINDOW", window)
    (tmp_path / "data.json").write_text('[{"id": 1},\n' * 1 + '{"a": "é"},\n' * 40 + '  {"id": }]')
    with pytest.raises(UserError, match="line 42, column 10: Expecting value"):
        list(JsonListFile(tmp_path / "data.json").ranges())


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "WINDOW", 10_000)
    broken = tmp_path / "broken.json"
    broken.write_text("[" + json.dumps("x" * 100) + ',\n{"y" "z"}' + ',"some text"' * 200_000)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(["some text"] * 200_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in JsonListFile(whole).ranges()) == 200_000
        with pytest.raises(UserError, match="line 2, column 6: Expecting ':' delimiter"):
            list(JsonListFile(broken).ranges())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_a_long_entry_takes_few_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "WINDOW", 100)
    (tmp_path / "data.json").write_text(json.dumps(["x" * 200_000]))
    reads, read = [], JsonListFile.read
    monkeypatch.setattr(JsonListFile, "read", lambda *place: reads.append(place) or read(*place))
    assert list(JsonListFile(tmp_path / "data.json").ranges()) == [(1, 200_003)]
    assert len(reads) < 30
