"""The decisions of the job script, with Slurm replaced. tests/slurm has the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.backends.node_probe import Place, run_place
from launcher.backends.slurm import batch
from launcher.backends.slurm.lifecycle import Action, Decision, JobState
from launcher.run import attempts
from launcher.run.attempts import Reason


@pytest.fixture
def run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on two nodes of one rank each, whose first attempt is open."""
    folder, _ = make_run(nodes=2, gpus_per_node=1)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.delenv("ALIGNKD_RUN", raising=False)
    monkeypatch.setattr(batch, "job_state", lambda _job: JobState())
    monkeypatch.setattr(batch, "nodes_that_see", lambda *_: {})
    monkeypatch.setattr(batch, "ask_nodes", lambda *_: {})
    monkeypatch.setattr(batch, "hostnames", lambda _nodes: [])
    attempts.begin(folder, "7", "n[1-2]", None)
    return folder


@pytest.mark.parametrize(
    ("action", "kept"), [(Action.RESTART, True), (Action.WAIT, True), (Action.EXIT, False)]
)
def test_a_late_stop_is_kept_for_the_next_start(
    run: Path, monkeypatch: pytest.MonkeyPatch, action: Action, kept: bool
) -> None:
    def decide(_evidence: object) -> Decision:
        RunPaths(run).stop.touch()  # `alignkd stop`, just now
        return Decision(action, 0, Reason.CRASHED, "why")

    monkeypatch.setattr(batch, "decide", decide)
    assert batch.end_attempt(run, 1) == f"{action} 0"
    assert RunPaths(run).stop.exists() == kept


@pytest.mark.parametrize(
    ("names", "answers", "lost"),
    [
        (["n1", "n2"], {"n1": True}, "node lost"),
        (["n1", "n2"], {}, "crashed"),  # no step can be started
        ([], {"n1": True}, "crashed"),  # scontrol does not answer
    ],
)
def test_a_node_that_does_not_respond_is_lost_only_if_others_respond(
    run: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], answers: dict[str, bool], lost: str
) -> None:
    RunPaths(run).exit_file(0).write_text("1 12.5\n")
    monkeypatch.setattr(batch, "hostnames", lambda _nodes: names)
    monkeypatch.setattr(batch, "nodes_that_see", lambda *_: answers)
    assert batch.end_attempt(run, 1) == "restart 0"
    assert [attempt.reason for attempt in attempts.read_history(run)] == [lost]


def test_a_node_without_a_gpu_is_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunPaths(run).exit_file(1).write_text("88 12.5\n")
    RunPaths(run).exit_file(0).write_text("143 13.5\n")
    monkeypatch.setattr(batch, "hostnames", lambda _nodes: ["n1", "n2"])
    assert batch.end_attempt(run, 1) == "restart 0"
    (ended,) = attempts.read_history(run)
    assert (ended.reason, ended.bad_nodes, ended.failed_rank) == ("unusable node", ("n2",), 1)
    assert attempts.fruitless_restarts(run) == 1


@pytest.fixture
def job(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The first start of a job; the previous attempt is closed."""
    open_before = attempts.open_attempt(run)
    assert open_before is not None
    attempts.close(run, open_before, Reason.STOPPED)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(batch, "queue_seconds", lambda _job: None)
    return "8"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("USR1 8\n", "exit 85"), ("TERM 8\n", "exit 86"), ("USR1 7\n", "run 2"), ("TERM 7\n", "run 2")],
)
def test_a_stop_before_the_attempt_began_counts_only_for_its_jobs(
    run: Path, job: str, text: str, answer: str
) -> None:
    """A stop that was meant for another job must not stop this one."""
    RunPaths(run).stop.write_text(text)
    assert batch.begin_attempt(run) == answer
    assert not RunPaths(run).stop.exists()
    assert len(attempts.read_history(run)) == 1


@pytest.mark.parametrize(
    ("name", "answer", "reason"), [("USR1", "exit 85", "stopped"), ("TERM", "exit 86", "cancelled")]
)
def test_a_stop_during_the_node_probe_ends_the_attempt(
    run: Path, job: str, monkeypatch: pytest.MonkeyPatch, name: str, answer: str, reason: str
) -> None:
    """Its signal ends the probe, which says nothing about the nodes."""

    def ask_nodes(*_: object) -> dict[str, list[Place]]:
        RunPaths(run).stop.write_text(f"{name} 8\n")
        return {"n1": [run_place(run)], "n2": [run_place(run)]}

    monkeypatch.setattr(batch, "ask_nodes", ask_nodes)
    assert batch.begin_attempt(run) == answer
    assert [attempt.reason for attempt in attempts.read_history(run)] == ["stopped", reason]


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_chained_job_is_cancelled_after_a_stop_or_a_cancel(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(batch, "run_slurm_command", lambda *words: asked.append(words) or "")
    RunPaths(run).stop.write_text(f"{name} 7\n")
    batch.follow(run, "9")
    assert asked == [("scancel", "9")]
    assert not RunPaths(run).stop.exists()


def test_inside_an_allocation_the_script_never_waits_for_a_requeue(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKD_RUN", str(run))
    for rank in range(2):
        RunPaths(run).exit_file(rank).write_text("86 12.5\n")
    RunPaths(run).stop.write_text("TERM 7\n")
    assert batch.end_attempt(run, 0) == "exit 86"
    assert [attempt.reason for attempt in attempts.read_history(run)] == ["cancelled"]
    attempts.begin(run, "7", "n[1-2]", None)
    for rank in range(2):
        RunPaths(run).exit_file(rank).write_text("86 12.5\n")
    assert batch.end_attempt(run, 0) == "exit 86"
    assert attempts.read_history(run)[1].reason == "terminated"
