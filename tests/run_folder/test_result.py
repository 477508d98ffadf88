from __future__ import annotations

import json
from pathlib import Path

from alignkd.run_folder.result import result_status, write_result


def test_a_result_has_the_first_and_the_last_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert result_status(tmp_path) is None
    write_result(tmp_path, {"status": "done", "step": 3})
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "status": "done",
        "step": 3,
        "first": {"step": 1},
        "last": {"step": 3},
    }
    assert result_status(tmp_path) == "done"


def test_a_result_without_rows_says_so(tmp_path: Path) -> None:
    write_result(tmp_path, {"status": "stopped"})
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["first"], result["last"]) == (None, None)
    assert result_status(tmp_path) == "stopped"


def test_a_damaged_result_has_no_status(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"status": 7}'):
        (tmp_path / "result.json").write_text(text)
        assert result_status(tmp_path) is None, text
