import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher.backends import local
from launcher.commands.launch import LaunchRequest, launch
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.commands.stages import check_runs, link, stage_names


def test_stage_names_come_from_either_option() -> None:
    assert stage_names(None, None, None) == [None]
    assert stage_names("a", None, "x") == ["a"]
    assert stage_names(None, "a, b", None) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments", [("a", "a,b", None), (None, "a,b", "x"), (None, ",", None), (None, "a,a", None)]
)
def test_options_that_contradict_each_other_are_refused(arguments) -> None:
    with pytest.raises(UserError, match="stage"):
        stage_names(*arguments)


def test_two_stages_may_not_share_a_run_folder() -> None:
    check_runs(["a", "b"], [Path("/r/a"), Path("/r/b")])
    with pytest.raises(UserError, match="stages a and c have the same run"):
        check_runs(["a", "b", "c"], [Path("/r/a"), Path("/r/b"), Path("/r/a")])


def test_both_run_folders_record_that_one_stage_follows_the_other(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        run.mkdir()
    link(one, two)
    assert json.loads((one / "next.json").read_text()) == {"run": str(two)}
    assert json.loads((two / "previous.json").read_text()) == {"run": str(one)}


RANK = """
import pathlib, sys
run = pathlib.Path(sys.argv[1])
with open(run.parent / "order", "a") as order:
    order.write(run.name + " ")
sys.exit(int((run.parent / f"code-{run.name}").read_text()))
"""


def test_on_the_local_back_end_a_failed_stage_keeps_the_next_from_starting(config_file, monkeypatch) -> None:
    stages = "".join(f"  {n}: {{run: {{name: {n}}}}}\n" for n in ("a", "b", "c"))
    config_file.write_text(config_file.read_text() + "stages:\n" + stages)
    runs = config_file.parent / "runs"
    runs.mkdir()
    for name, code in {"a": 0, "b": 3, "c": 0}.items():
        (runs / f"code-{name}").write_text(str(code))
    monkeypatch.setattr(local, "rank_command", lambda run: [sys.executable, "-c", RANK, str(run)])
    console = Console(file=io.StringIO())
    result = launch(LaunchRequest(config_file, backend="local", stages="a,b,c"), console)
    assert result["code"] == 3
    assert [(Path(stage["run"]).name, stage["code"]) for stage in result["stages"]] == [("a", 0), ("b", 3)]
    assert (runs / "order").read_text() == "a b "
    assert (runs / "c" / "manifest.json").exists()
    (runs / "code-b").write_text("0")
    assert [resume_run(runs / name, ResumeRequest(), console)["code"] for name in ("b", "c")] == [0, 0]
    assert (runs / "order").read_text() == "a b b c "
