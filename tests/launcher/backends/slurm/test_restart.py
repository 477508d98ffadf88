"""How a run comes back, with Slurm replaced by answers one by one. tests/slurm stops the real controller."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest

from alignkd.errors import AlignkdError
from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import restart as restart_module
from launcher.backends.slurm.lifecycle import JobState
from launcher.backends.slurm.restart import REQUEUE_TRIES, SUBMIT_TRIES, restart

READY = JobState()
NO_REQUEUE = replace(READY, requeueable=False)
T = TypeVar("T")


@dataclass
class FakeSlurm:
    """``states``, ``requeues``, ``queues`` and ``submissions`` are answers; the last of each is repeated."""

    states: list[JobState | None] = field(default_factory=lambda: [READY])
    requeues: list[bool] = field(default_factory=lambda: [True])
    queues: list[list[str] | None] = field(default_factory=lambda: [["7"]])
    submissions: list[str | None] = field(default_factory=lambda: ["9"])
    can_exclude: bool = True
    asked: list[str] = field(default_factory=list)

    def command(self, *words: str) -> str | None:
        self.asked.append(" ".join(words))
        return "" if words[1] != "requeue" or _next(self.requeues) else None

    def queue(self, _run: Path) -> list[QueuedJob] | None:
        ids = _next(self.queues)
        return None if ids is None else [QueuedJob(job, "RUNNING", "None", None, "") for job in ids]

    def submit(self, _run: Path, options: Sequence[str]) -> str:
        self.asked.append(" ".join(["sbatch", *options]))
        job = _next(self.submissions)
        if job is None:
            raise AlignkdError("sbatch refused it")
        return job


def _next(answers: list[T]) -> T:
    return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm()
    monkeypatch.setattr(restart_module, "job_state", lambda _job: _next(fake.states))
    monkeypatch.setattr(restart_module, "run_slurm_command", fake.command)
    monkeypatch.setattr(restart_module, "queued_jobs", fake.queue)
    monkeypatch.setattr(restart_module, "submit", fake.submit)
    monkeypatch.setattr(restart_module, "can_run_without", lambda _run, _nodes: fake.can_exclude)
    monkeypatch.setattr(restart_module, "retarget_dependency", lambda _run, _job: True)
    return fake


def go(run: Path, *suspects: str) -> int:
    return restart(run, "7", suspects, time.monotonic() + 60)


REQUEUE, CHAIN = "scontrol requeue 7", "sbatch --dependency=afterany:7"


@pytest.mark.parametrize(
    ("answers", "asked", "code"),
    [
        ({}, [REQUEUE], 0),
        ({"states": [None, None, READY]}, [REQUEUE], 0),  # silence
        ({"requeues": [False, True]}, [REQUEUE, REQUEUE], 0),
        # The first one was accepted although its answer got lost.
        ({"requeues": [False], "states": [READY, replace(READY, requeued=True)]}, [REQUEUE], 0),
        ({"requeues": [False]}, [REQUEUE] * REQUEUE_TRIES + [CHAIN], 85),
        ({"states": [NO_REQUEUE]}, [CHAIN], 85),
        ({"states": [NO_REQUEUE], "queues": [None, ["7"]]}, [CHAIN], 85),
        ({"states": [NO_REQUEUE], "submissions": [None, "9"]}, [CHAIN, CHAIN], 85),
        # The first one was accepted although its answer got lost.
        ({"states": [NO_REQUEUE], "submissions": [None], "queues": [["7"], ["7", "9"]]}, [CHAIN], 85),
        ({"states": [replace(READY, state="COMPLETING")]}, [], 86),
        ({"states": [None, replace(READY, state="COMPLETING")]}, [], 86),
        ({"states": [replace(READY, state="COMPLETING", reason="TimeLimit")]}, [REQUEUE], 0),
        ({"states": [NO_REQUEUE], "submissions": [None]}, [CHAIN] * SUBMIT_TRIES, 85),
    ],
)
def test_every_command_is_repeated_and_nothing_is_done_twice(
    run: Path, slurm: FakeSlurm, answers: dict[str, object], asked: list[str], code: int
) -> None:
    for name, value in answers.items():
        setattr(slurm, name, value)
    assert go(run) == code
    assert slurm.asked == asked


def test_a_restart_ends_at_its_deadline(run: Path, slurm: FakeSlurm) -> None:
    slurm.states = [None]
    assert restart(run, "7", (), time.monotonic() + 0.05) == 85
    assert slurm.asked == []


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        (READY, [REQUEUE, "scontrol update JobId=7 ExcNodeList=n2,n4"]),
        (replace(READY, excluded="n9"), [REQUEUE, "scontrol update JobId=7 ExcNodeList=n9,n2,n4"]),
        (NO_REQUEUE, [f"{CHAIN} --exclude=n2,n4"]),
    ],
)
def test_suspected_nodes_are_excluded_from_the_next_start(
    run: Path, slurm: FakeSlurm, state: JobState, asked: list[str]
) -> None:
    slurm.states = [state]
    go(run, "n2", "n4")
    assert slurm.asked == asked


@pytest.mark.parametrize(
    ("state", "asked"), [(READY, [REQUEUE]), (replace(NO_REQUEUE, excluded="n9"), [f"{CHAIN} --exclude=n9"])]
)
def test_no_node_is_excluded_that_the_job_needs(
    run: Path, slurm: FakeSlurm, state: JobState, asked: list[str]
) -> None:
    """It would be pending for ever."""
    slurm.states, slurm.can_exclude = [state], False
    go(run, "n2")
    assert slurm.asked == asked


def test_the_job_that_follows_is_recorded(run: Path, slurm: FakeSlurm) -> None:
    slurm.states = [NO_REQUEUE]
    write_json(RunPaths(run).job, {"job": "7", "attempts_before": 2})
    go(run)
    assert read_json(RunPaths(run).job) == {"job": "9", "attempts_before": 2}


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_chained_job_is_cancelled_after_a_stop_or_a_cancel(run: Path, slurm: FakeSlurm, name: str) -> None:
    slurm.states = [NO_REQUEUE]
    RunPaths(run).stop.write_text(f"{name} 7\n")
    go(run)
    assert slurm.asked == [CHAIN, "scancel 9"]
    assert not RunPaths(run).stop.exists()


@pytest.mark.parametrize(("stop", "asked"), [(False, [CHAIN]), (True, [CHAIN, "scancel 9"])])
def test_a_file_system_that_fails_does_not_keep_the_next_job_from_being_settled(
    run: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, stop: bool, asked: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    slurm.states = [NO_REQUEUE]
    retargeted: list[str] = []
    monkeypatch.setattr(restart_module, "retarget_dependency", lambda _run, job: not retargeted.append(job))
    if stop:
        RunPaths(run).stop.write_text("USR1 7\n")
    for name in ("write_json", "write_text_atomic"):
        monkeypatch.setattr(restart_module, name, fail)
    monkeypatch.setattr(Path, "unlink", fail)
    assert go(run) == 85
    assert (slurm.asked, retargeted) == (asked, [] if stop else ["9"])
