"""The end of an attempt, with Slurm replaced. tests/slurm has the real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.slurm import batch, script
from launcher.backends.slurm import finish as finish_module
from launcher.backends.slurm.finish import finish
from launcher.backends.slurm.lifecycle import Action, Decision, JobState
from launcher.run import attempts
from launcher.run.attempts import Reason
from launcher.run.hangs import Hang, write_hang
from launcher.run.manifest import read_manifest
from launcher.run.restarts import COUNTED, in_a_row


@pytest.fixture(autouse=True)
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The suspects of every restart, which ends with code 77."""
    calls: list[tuple[str, ...]] = []

    def restart(_run: Path, _job: str, suspects: tuple[str, ...], _deadline: float) -> int:
        calls.append(suspects)
        return 77

    monkeypatch.setattr(finish_module, "restart", restart)
    return calls


def end(run: Path, *codes: int) -> None:
    for rank, code in enumerate(codes):
        RunPaths(run).exit_file(rank).write_text(f"{code} 12.5\n")


def reasons(run: Path) -> list[str | None]:
    return [attempt.reason for attempt in attempts.read_history(run)]


@pytest.mark.parametrize(("action", "code"), [(Action.RESTART, 77), (Action.WAIT, 86), (Action.EXIT, 0)])
def test_a_late_stop_is_kept_for_the_next_start(
    run: Path, monkeypatch: pytest.MonkeyPatch, action: Action, code: int
) -> None:
    """Also where the job ends: Slurm may have requeued it."""

    def decide(_evidence: object) -> Decision:
        RunPaths(run).stop.touch()  # `alignkd stop`, just now
        return Decision(action, 0, Reason.CRASHED, "why")

    monkeypatch.setattr(finish_module, "decide", decide)
    assert finish(run, 1) == code
    assert RunPaths(run).stop.exists()


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
    end(run, 1)
    monkeypatch.setattr(finish_module, "hostnames", lambda _nodes: names)
    monkeypatch.setattr(finish_module, "nodes_that_see", lambda *_: answers)
    assert finish(run, 1) == 77
    assert reasons(run) == [lost]


def test_the_nodes_of_the_ranks_are_named_in_an_allocation_that_is_larger(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    end(run, 143, 3)
    RunPaths(run).exit_file(1).write_text("3 12.25\n")  # first
    assert finish(run, 1) == 77
    assert [attempt.failed_node for attempt in attempts.read_history(run)] == ["n2"]


def answering(monkeypatch: pytest.MonkeyPatch, *answers: JobState | None) -> list[JobState | None]:
    """Slurm's answers about the job, one by one; returns those that are left."""
    left = list(answers)
    monkeypatch.setattr(finish_module, "job_state", lambda _job: left.pop(0))
    return left


def test_silence_after_a_save_is_waited_out_and_is_no_cancel(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(run, 85, 85)
    left = answering(monkeypatch, None, None, JobState())
    assert finish(run, 0) == 77
    assert (reasons(run), left) == (["time limit"], [])


def test_a_stop_that_is_asked_for_while_slurm_is_silent_counts(
    run: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[object]
) -> None:
    end(run, 85, 85)
    answering(monkeypatch, None)
    monkeypatch.setattr(script, "pause", lambda _seconds: RunPaths(run).stop.write_text("USR1 7\n"))
    assert finish(run, 0) == 85
    assert (reasons(run), restarts) == (["stopped"], [])


PREEMPTED = JobState(preempted=True)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([replace(PREEMPTED, state="COMPLETING", requeued=True)], 86),  # Slurm brings it back
        ([None, PREEMPTED, None, replace(PREEMPTED, state="COMPLETING", requeued=True)], 86),
        ([replace(PREEMPTED, state="COMPLETING")], 86),  # scancel
        ([replace(PREEMPTED, state="COMPLETING", preempt_mode="CANCEL", grace_over=True)], 77),
    ],
)
def test_a_preempted_job_waits_until_slurm_has_decided(
    run: Path, monkeypatch: pytest.MonkeyPatch, answers: list[JobState | None], code: int
) -> None:
    end(run, 86, 86)
    left = answering(monkeypatch, PREEMPTED, *answers)
    assert finish(run, 0) == code
    assert (reasons(run), left) == (["preempted"], [])


@pytest.mark.parametrize(
    "job", [replace(PREEMPTED, requeueable=False), replace(PREEMPTED, preempt_mode="CANCEL")]
)
def test_a_preempted_job_that_slurm_would_only_cancel_restarts_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, job: JobState
) -> None:
    end(run, 86, 86)
    left = answering(monkeypatch, job)
    assert finish(run, 0) == 77
    assert (reasons(run), left) == (["preempted"], [])


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_stop_holds_while_slurm_itself_requeues_the_job(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The ranks have saved for the stop, and Slurm has preempted the job: its next start must not train."""
    end(run, 85, 85)
    RunPaths(run).stop.write_text(f"{name} 7\n")
    code = {"USR1": 85, "TERM": 86}[name]
    assert finish(run, 0) == code
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert batch.begin_attempt(run) == f"exit {code}"
    assert not RunPaths(run).stop.exists()


def test_the_node_of_the_failed_rank_is_recorded_and_suspected_after_the_second_crash(
    run: Path, restarts: list[tuple[str, ...]]
) -> None:
    for _ in range(2):
        end(run, 143, 3)
        RunPaths(run).exit_file(1).write_text("3 12.25\n")  # first
        assert finish(run, 1) == 77
        attempts.begin(run, "7", "n[1-2]", None)
    assert [attempt.failed_node for attempt in attempts.read_history(run)] == ["n2", "n2"]
    assert restarts == [(), ("n2",)]


def test_an_end_that_failed_after_the_attempt_was_closed_is_taken_up_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[object]
) -> None:
    """The script calls again when the first call has printed no exit code."""
    monkeypatch.setenv("ALIGNKD_ATTEMPT", "1")
    end(run, 85, 85)

    def fail(*_: object) -> int:
        raise OSError("Stale file handle")

    with monkeypatch.context() as failing:
        failing.setattr(finish_module, "restart", fail)
        with pytest.raises(OSError, match="Stale"):
            finish(run, 0)
    assert finish(run, 0) == 77
    assert (reasons(run), restarts) == (["time limit"], [()])


def test_a_run_that_was_given_up_stays_so_and_its_last_attempt_counts_once(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNKD_MAX_RESTARTS", "1")
    for number, code in (("1", 77), ("2", 3)):
        monkeypatch.setenv("ALIGNKD_ATTEMPT", number)
        end(run, 3, 143)
        assert [finish(run, 1), finish(run, 1)] == [code, code]
        if code == 77:
            attempts.begin(run, "7", "n[1-2]", None)
    assert reasons(run) == ["crashed", "crashed"]


def test_a_closed_attempt_of_another_start_is_left_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[object]
) -> None:
    monkeypatch.setenv("ALIGNKD_ATTEMPT", "1")
    end(run, 85, 85)
    finish(run, 0)
    monkeypatch.setenv("ALIGNKD_ATTEMPT", "2")
    assert finish(run, 5) == 5
    assert len(restarts) == 1


def save(run: Path) -> None:
    step = run / "checkpoints" / "step-5"
    step.mkdir(parents=True)
    (step / "COMMITTED").touch()


def test_bad_input_on_the_only_node_of_a_run_is_not_the_fault_of_the_node(
    run: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[object]
) -> None:
    manifest = read_manifest(run)
    write_json(RunPaths(run).manifest, {**manifest.as_dict(), "nodes": 1, "gpus_per_node": 2})
    monkeypatch.setattr(finish_module, "hostnames", lambda _nodes: ["n1"])
    save(run)
    end(run, 143, 2)
    assert finish(run, 2) == 2
    assert (reasons(run), restarts) == (["configuration error"], [])


def test_a_complaint_that_a_shared_file_system_shows_late_clears_the_other_node(
    run: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[object]
) -> None:
    save(run)
    RunPaths(run).exit_file(1).write_text("2 12.5\n")
    monkeypatch.setattr(
        finish_module.time, "sleep", lambda _seconds: RunPaths(run).exit_file(0).write_text("2 12.75\n")
    )
    assert finish(run, 2) == 2
    assert (reasons(run), restarts) == (["configuration error"], [])


def test_bad_input_on_one_node_after_a_checkpoint_excludes_the_node(
    run: Path, restarts: list[tuple[str, ...]]
) -> None:
    save(run)
    end(run, 143, 2)
    assert finish(run, 1) == 77
    assert [(a.reason, a.bad_nodes) for a in attempts.read_history(run)] == [("node at fault", ("n2",))]
    assert restarts == [("n2",)]


@pytest.mark.parametrize(
    ("codes", "srun_status", "code", "reason"),
    [
        ((85, 85), 0, 85, "time limit"),
        ((86, 86), 0, 86, "terminated"),
        ((3, 143), 1, 3, "crashed"),  # not 85: nothing was saved
        ((0,), 1, 1, "crashed"),
    ],
)
def test_inside_an_allocation_the_script_ends_with_the_code_of_the_ranks(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: list[object],
    codes: tuple[int, ...],
    srun_status: int,
    code: int,
    reason: str,
) -> None:
    """It never waits for a requeue, nor restarts: the job is the user's shell."""
    monkeypatch.setenv("ALIGNKD_RUN", str(run))
    answering(monkeypatch)  # Slurm is not asked
    end(run, *codes)
    assert finish(run, srun_status) == code
    assert (reasons(run), restarts) == ([reason], [])


def test_a_cancel_inside_an_allocation_is_recorded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNKD_RUN", str(run))
    end(run, 86, 86)
    RunPaths(run).stop.write_text("TERM 7\n")
    assert finish(run, 0) == 86
    assert reasons(run) == ["cancelled"]


def test_a_node_without_a_gpu_is_recorded_and_excluded(run: Path, restarts: list[tuple[str, ...]]) -> None:
    RunPaths(run).exit_file(1).write_text("88 12.5\n")
    RunPaths(run).exit_file(0).write_text("143 13.5\n")
    assert finish(run, 1) == 77
    (ended,) = attempts.read_history(run)
    assert (ended.reason, ended.bad_nodes, ended.failed_rank) == ("unusable node", ("n2",), 1)
    assert in_a_row([ended], COUNTED) == 1
    assert restarts == [("n2",)]


def test_a_hang_is_recorded_with_the_rank_and_the_node_that_are_behind(run: Path) -> None:
    end(run, 137, 137)
    write_hang(run, Hang((1,), ("n2",), "rank 1 on n2 is behind; stopped"))
    assert finish(run, 1) == 77
    (ended,) = attempts.read_history(run)
    assert (ended.reason, ended.bad_nodes, ended.failed_rank) == ("hung", ("n2",), 1)
    assert in_a_row([ended], COUNTED) == 1
