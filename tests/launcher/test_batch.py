"""What the job script asks, without Slurm. The real one is in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import attempts, batch
from launcher.attempts import STOP
from launcher.lifecycle import Action, Decision, JobState, Reason


@pytest.fixture
def run(make_run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its first attempt is open, and its two ranks are on a node each."""
    folder, _ = make_run(nodes=2, gpus_per_node=1)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.delenv("ALIGNKD_RUN", raising=False)
    monkeypatch.setattr(batch, "job_state", lambda _job: JobState())
    monkeypatch.setattr(batch, "nodes_that_see", lambda *_: {})
    monkeypatch.setattr(batch, "hostnames", lambda _nodes: [])
    attempts.begin(folder, "7", "n[1-2]", None)
    return folder


@pytest.mark.parametrize(
    ("action", "kept"), [(Action.RESTART, True), (Action.WAIT, True), (Action.EXIT, False)]
)
def test_a_stop_that_comes_too_late_is_for_the_next_start(
    run: Path, monkeypatch: pytest.MonkeyPatch, action: Action, kept: bool
) -> None:
    def decide(_evidence: object) -> Decision:
        (run / STOP).touch()  # `alignkd stop`, just now
        return Decision(action, 0, Reason.CRASHED, "why")

    monkeypatch.setattr(batch, "decide", decide)
    assert batch.end_attempt(run, 1) == f"{action} 0"
    assert (run / STOP).exists() == kept


@pytest.mark.parametrize(
    ("names", "answers", "lost"),
    [
        (["n1", "n2"], {"n1": True}, "node lost"),
        (["n1", "n2"], {}, "crashed"),  # no step can be started
        ([], {"n1": True}, "crashed"),  # scontrol does not answer
    ],
)
def test_a_silent_node(
    run: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], answers: dict[str, bool], lost: str
) -> None:
    (run / attempts.EXITS / "rank-0").write_text("1 12.5\n")
    monkeypatch.setattr(batch, "hostnames", lambda _nodes: names)
    monkeypatch.setattr(batch, "nodes_that_see", lambda *_: answers)
    assert batch.end_attempt(run, 1) == "restart 0"
    assert [attempt.reason for attempt in attempts.read_history(run)] == [lost]
