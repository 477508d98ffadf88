"""How a job begins, with Slurm replaced. tests/slurm has the real one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignkd.run_folder.paths import RunPaths
from launcher.backends.node_probe import Place, run_place
from launcher.backends.slurm import batch
from launcher.backends.slurm.lifecycle import MAX_AT_FAULT
from launcher.run import attempts
from launcher.run.attempts import Attempt, Reason
from launcher.run.restarts import MAX_LOST
from tests.launcher.backends.slurm.programs import put_program


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


@pytest.mark.parametrize(
    ("blind", "trained", "before", "allocation", "answer", "reason"),
    [
        (("n2",), True, 0, False, "exit 77", "node at fault"),
        (("n2",), True, MAX_AT_FAULT - 1, False, "exit 77", "node at fault"),
        (("n2",), True, MAX_AT_FAULT, False, "exit 2", "configuration error"),
        (("n2",), False, 0, False, "exit 2", "configuration error"),  # the first start: most likely a typo
        (("n1", "n2"), True, 0, False, "exit 2", "configuration error"),  # so it is not the node
        (("n2",), True, 0, True, "exit 2", "configuration error"),  # an allocation is not requeued
    ],
)
def test_one_node_that_sees_too_little_is_left_out_of_a_run_that_has_trained(
    run: Path,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    blind: tuple[str, ...],
    trained: bool,
    before: int,
    allocation: bool,
    answer: str,
    reason: str,
) -> None:
    calls: list[tuple[object, ...]] = []

    def restart(_run: Path, *arguments: object) -> int:
        calls.append(arguments[:2])
        return 77

    for _ in range(before):
        attempts.close(run, attempts.begin(run, "8", "n[1-2]", None), Reason.NODE_AT_FAULT, ["n2"])
    if trained:
        step = run / "checkpoints" / "step-5"
        step.mkdir(parents=True)
        (step / "COMMITTED").touch()
    if allocation:
        monkeypatch.setenv("ALIGNKD_RUN", str(run))
    seen = {node: [run_place(run)] if node in blind else [] for node in ("n1", "n2")}
    monkeypatch.setattr(batch, "ask_nodes", lambda *_: seen)
    monkeypatch.setattr(batch, "restart", restart)
    monkeypatch.setattr(batch, "hold_sigterm", lambda: calls.append(("held",)))
    assert batch.begin_attempt(run) == answer
    last = attempts.read_history(run)[-1]
    assert (last.reason, last.bad_nodes) == (reason, blind)
    assert calls == ([("held",), ("8", ("n2",))] if answer == "exit 77" else [])


def test_only_the_nodes_of_the_ranks_are_asked_and_recorded_in_an_allocation_that_is_larger(
    run: Path, job: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    programs, asked = tmp_path / "programs", tmp_path / "asked"
    put_program(programs, "scontrol", "printf 'n%s\\n' 1 2 3 4", monkeypatch)
    put_program(programs, "srun", f'printf "%s\\n" "$@" >{asked}', monkeypatch)
    assert batch.begin_attempt(run) == "run 2"
    assert {"--nodelist=n1,n2", "--nodes=2", "--ntasks=2"} <= set(asked.read_text().split("\n"))
    opened = attempts.open_attempt(run)
    assert opened is not None
    assert opened.nodes == "n1,n2"


def lose_nodes(run: Path, count: int) -> None:
    with RunPaths(run).attempts.open("w") as file:
        for number in range(1, count + 1):
            lost = Attempt(number, "8", "n[1-2]", 0.0, 0, reason="node lost", saved_step=0, bad_nodes=("n2",))
            file.write(json.dumps(asdict(lost)) + "\n")


@pytest.mark.parametrize(
    ("lost", "restarts", "answer"),
    [
        (MAX_LOST - 1, "9", f"run {MAX_LOST}"),
        (MAX_LOST, "9", "exit 1"),
        (MAX_LOST, None, f"run {MAX_LOST + 1}"),  # submitted by a person, who knows
    ],
)
def test_a_run_that_loses_node_after_node_does_not_start_again(
    run: Path, job: str, monkeypatch: pytest.MonkeyPatch, lost: int, restarts: str | None, answer: str
) -> None:
    lose_nodes(run, lost)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(batch, "ask_nodes", lambda *_: {})
    assert batch.begin_attempt(run) == answer


@pytest.mark.parametrize(("answers", "answer"), [([None, None, {"7"}], "exit 2"), ([None, set()], "run 2")])
def test_a_start_waits_to_hear_whether_the_run_is_being_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, answers: list[set[str] | None], answer: str
) -> None:
    """Two jobs would write the same checkpoints, so silence must not pass for a no."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(batch, "queue_seconds", lambda _job: None)
    monkeypatch.setattr(batch, "lost_nodes", lambda *_: [])
    monkeypatch.setattr(batch, "ask_nodes", lambda *_: {})
    left = iter(answers)
    monkeypatch.setattr(batch, "running_jobs", lambda _jobs: next(left))
    assert batch.begin_attempt(run) == answer
    assert next(left, "nothing") == "nothing"
