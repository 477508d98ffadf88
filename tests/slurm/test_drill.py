"""The drill on the real Slurm, with ranks that keep the contract."""

from __future__ import annotations

import json

import pytest

from tests.slurm.runs import Runs

# The run that is interrupted waits for each event.
PLAN = {"steps": 40, "seconds": 0.02, "every": 7, "failures": [], "hold": {"run-drill-cut": [5, 10, 16]}}


@pytest.mark.parametrize(
    ("options", "first", "reason"),
    [
        ((), "a requeue by scontrol, in place of a preemption (no --preempt-with): resumed", "requeued"),
        (("--preempt-with", "--partition=high --exclusive"), "a preemption: resumed at step ", "preempted"),
    ],
)
def test_the_drill_passes_on_a_site_that_grants_everything(
    runs: Runs, options: tuple[str, ...], first: str, reason: str
) -> None:
    run = runs.prepare()
    (run.parent / "toy.json").write_text(json.dumps(PLAN))
    findings = json.loads(runs.alignkd("drill", run, "--steps", 40, *options, "--json"))
    assert all(finding["ok"] for finding in findings), findings
    texts = [finding["text"] for finding in findings]
    for text, start in zip(
        texts,
        [
            first,
            "SIGUSR1, as before a time limit: resumed at step ",
            "one killed rank: resumed at step ",
            "2 of 2 ranks",
            "the losses of all 40",
        ],
        strict=True,
    ):
        assert text.startswith(start)
    assert runs.reasons(run.parent / "run-drill-cut") == [reason, "time limit", "crashed", "done"]
    killed = runs.attempts(run.parent / "run-drill-cut")[2]
    assert (killed.failed_rank, killed.exit_code) == (1, 137)  # one, by SIGKILL
    assert runs.reasons(run.parent / "run-drill-whole") == ["done"]
    assert not (run / "attempts.jsonl").exists()  # the run itself is not touched


def test_the_drill_reports_a_site_that_does_not_requeue(runs: Runs) -> None:
    run = runs.prepare(slurm={"requeue": False})
    (run.parent / "run-drill-whole").mkdir()  # of an earlier drill
    (run.parent / "toy.json").write_text(json.dumps({**PLAN, "hold": {"run-drill-2-cut": [5, 10]}}))
    findings = json.loads(runs.alignkd("drill", run, "--steps", 40, "--json", code=1))
    assert "this cluster does not requeue the job; set slurm.requeue: false" in findings[0]["text"]
    assert "refused by Slurm (scontrol requeue " in findings[1]["text"]
    assert [finding["ok"] for finding in findings] == [False, False, True, True, True, True]
    jobs = [attempt.job for attempt in runs.attempts(run.parent / "run-drill-2-cut")]
    assert len(set(jobs)) == 3  # chained
