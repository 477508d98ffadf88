import json
from pathlib import Path

import pytest

from alignkd.errors import UserError
from launcher import stages
from launcher.slurm import QueuedJob
from launcher.stages import check_runs, hand_on, link, stage_names


def test_names() -> None:
    assert stage_names(None, None, None) == [None]
    assert stage_names("a", None, "x") == ["a"]
    assert stage_names(None, "a, b", None) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments", [("a", "a,b", None), (None, "a,b", "x"), (None, ",", None), (None, "a,a", None)]
)
def test_what_does_not_fit(arguments) -> None:
    with pytest.raises(UserError, match="stage"):
        stage_names(*arguments)


def test_one_folder_for_two_stages() -> None:
    check_runs(["a", "b"], [Path("/r/a"), Path("/r/b")])
    with pytest.raises(UserError, match="stages a and c have the same run"):
        check_runs(["a", "b", "c"], [Path("/r/a"), Path("/r/b"), Path("/r/a")])


def test_only_a_stage_that_waits_is_told(tmp_path, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(stages, "ask", lambda *words: told.append(words))
    jobs = [QueuedJob("7", "PENDING", "Dependency", None, ""), QueuedJob("8", "RUNNING", "None", None, "")]
    monkeypatch.setattr(stages, "queued_jobs", lambda run: jobs if run == Path("/r/b") else [])
    hand_on(tmp_path, "9")
    assert told == []
    link(tmp_path, Path("/r/b"))
    assert json.loads((tmp_path / "next.json").read_text()) == {"run": "/r/b"}
    hand_on(tmp_path, "9")
    assert told == [("scontrol", "update", "JobId=7", "Dependency=afterok:9")]
