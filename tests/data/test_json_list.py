from __future__ import annotations

import json
import pickle

import pytest

from alignkd.data.json_list import JsonListFile
from alignkd.errors import UserError

ENTRIES = [{"id": "Größe, 大 😀", "b": [1, 2, {"c": "]},{"}]}, 'text \\ " ,', 3.5, None, [], {"x": "é"}]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_entries_are_found_by_their_bytes(tmp_path, ascii_only, indent, mark):
    path = tmp_path / "data.json"
    path.write_bytes(mark + json.dumps(ENTRIES, ensure_ascii=ascii_only, indent=indent).encode() + b"\n ")
    file = JsonListFile(path)
    ranges = list(file.ranges())
    assert [file.entry(*byte_range) for byte_range in ranges] == ENTRIES
    copy = pickle.loads(pickle.dumps(file))
    assert copy.entry(*ranges[0]) == ENTRIES[0]


def test_an_empty_list_has_no_entries(tmp_path):
    (tmp_path / "data.json").write_text(" [ ] ")
    assert list(JsonListFile(tmp_path / "data.json").ranges()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a JSON list"),
        ('{"a": 1}', "must be a JSON list"),
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
