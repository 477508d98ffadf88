"""Entries found by their marks are those that the parser finds."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from alignkd.data import json_list
from alignkd.data.json_list import JsonListFile
from alignkd.errors import UserError

PIECES = ['"', "\\", "\\\\", '\\"', "[", "]", "{", "}", ",", "é", "大", " ", "\n", "a", "\\u005c", ":"]


def random_value(pick: random.Random, depth: int = 0) -> object:
    kind = pick.randrange(6 if depth < 4 else 3)
    if kind < 2:
        return "".join(pick.choices(PIECES, k=pick.randrange(9)))
    if kind == 2:
        return pick.choice([None, True, 1, -2.5e-3])
    if kind == 3:
        return [random_value(pick, depth + 1) for _ in range(pick.randrange(4))]
    return {str(random_value(pick, 9)): random_value(pick, depth + 1) for _ in range(pick.randrange(4))}


@pytest.mark.parametrize("window", [1, 2, 7, 64, 1 << 20])
def test_separators_fit_the_parsed_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(json_list, "WINDOW", window)
    pick = random.Random(window)
    for turn in range(60):
        entries = [random_value(pick) for _ in range(pick.randrange(6))]
        text = json.dumps(entries, ensure_ascii=turn % 2 == 0, indent=pick.choice([None, 1]))
        path = tmp_path / "data.json"
        path.write_bytes((b"\xef\xbb\xbf" if turn % 3 == 0 else b" ") + text.encode() + b" \n")
        file = JsonListFile(path)
        found = file.separators().tolist()
        assert len(found) == len(entries) + 1
        for (start, stop), before, after in zip(file.ranges(), found, found[1:], strict=False):
            assert before < start
            assert stop <= after
        values = [file.parsed(file.read(a + 1, b), a, b) for a, b in pairwise(found)]
        assert values == entries


@pytest.mark.parametrize(
    "text", ["", "{}", "[", "]", "[1]]", "[[1]", '["a]', "[1] [2]", "[1}", '["\\', "[1]x", "x[1]", "[1],"]
)
def test_what_is_no_list_is_named_with_the_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json: (not valid JSON at line 1|must be a JSON list)"):
        JsonListFile(tmp_path / "data.json").separators()
