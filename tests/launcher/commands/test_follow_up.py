"""The evaluation that follows a run. tests/slurm/test_evaluation.py runs it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import AlignkdError, UserError
from alignkd.evaluate.options import ModelChoice, read_options
from launcher.backends import backend_named
from launcher.commands import evaluate_job, follow_up
from launcher.commands.follow_up import FollowUp, plan_follow_up
from launcher.run.folder import run_path
from tests import tiny
from tests.evaluate.questions import QUESTIONS, write_questions
from tests.launcher.render.test_job_scripts import directives


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_questions(tmp_path / "data" / "sample" / "test.json", ["a"] * len(QUESTIONS))
    (tmp_path / "data" / "sample" / "images").symlink_to(tiny.FOLDER)
    return tmp_path / "data"


@pytest.fixture
def plan(data: Path, make_config, monkeypatch: pytest.MonkeyPatch) -> FollowUp:
    monkeypatch.setattr(evaluate_job, "slurm_is_installed", lambda: True)
    monkeypatch.setattr(evaluate_job, "script_problems", lambda *_: [])
    config = make_config("slurm.partition=gpu", "slurm.gpu_option=gres")
    return plan_follow_up("sample", data, config, 4, backend_named("slurm"))


def test_it_asks_the_exported_student_on_one_node_with_the_settings_of_the_run(plan: FollowUp) -> None:
    assert not plan.run.exists()
    plan.run.mkdir(parents=True)
    plan.write()
    values = directives((plan.run / "eval" / "job.sbatch").read_text())
    assert (values["nodes"], values["partition"], values["gres"]) == ("1", "gpu", "gpu:4")
    assert values["job-name"] == f"eval-{plan.run.name}"
    assert read_options(plan.out).models == (ModelChoice(plan.run.name, str(plan.run / "student")),)
    # By this file the job is made to wait for the run's newest job.
    assert json.loads((plan.run / "next.json").read_text()) == {"run": str(plan.run / "eval")}


def test_it_waits_for_the_job_of_the_run(plan: FollowUp, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(follow_up, "submit", lambda *given: asked.extend(given) or "8")
    console = Console(file=io.StringIO())
    assert plan.submit("7", console) == {"job": "8", "out": str(plan.out), "code": 0}
    assert asked == [plan.out, ["--dependency=afterok:7", "--kill-on-invalid-dep=no"]]


def test_a_run_is_not_lost_with_its_evaluation(plan: FollowUp, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AlignkdError("job limit reached")

    monkeypatch.setattr(follow_up, "submit", refuse)
    for after, problem in (("7", "job limit reached"), (None, "the run has no job")):
        shown = io.StringIO()
        result = plan.submit(after, Console(file=shown, width=300))
        assert (result["job"], result["code"], result["error"]) == (None, 1, problem)
        assert problem in shown.getvalue()
        assert f"sbatch {plan.run}/eval/job.sbatch" in shown.getvalue()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("own", "use `alignkd eval` after the run"), ("popa", "did you mean pope"), ("pope", "coco_pope")],
)
def test_an_evaluation_that_could_not_run_is_refused(
    data: Path, make_config, tasks: str, message: str
) -> None:
    config = make_config()
    with pytest.raises(UserError, match=message):
        plan_follow_up(tasks, data, config, 1, backend_named("slurm"))
    assert not run_path(config).exists()


def test_in_the_shell_of_an_allocation_nothing_is_queued(
    data: Path, make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_up, "in_allocation", lambda: True)
    with pytest.raises(UserError, match="here nothing is queued"):
        plan_follow_up("sample", data, make_config(), 1, backend_named("slurm"))
