"""The drill on the real Slurm, with ranks that keep the contract."""

from __future__ import annotations

import json

from tests.slurm.runs import Runs

PLAN = {"steps": 40, "seconds": 0.15, "every": 7, "failures": []}


def test_a_site_that_grants_everything(runs: Runs) -> None:
    run = runs.prepare()
    (run.parent / "toy.json").write_text(json.dumps(PLAN))
    findings = json.loads(runs.alignkd("drill", run, "--steps", 40, "--json"))
    assert all(finding["ok"] for finding in findings), findings
    texts = [finding["text"] for finding in findings]
    for text, start in zip(
        texts,
        [
            "a requeue, as by",
            "SIGUSR1, as before",
            "killed ranks: went on",
            "2 of 2 ranks",
            "the losses of all 40",
        ],
        strict=True,
    ):
        assert text.startswith(start)
    assert runs.reasons(run.parent / "run-drill-cut")[-2:] == ["crashed", "done"]
    assert runs.reasons(run.parent / "run-drill-whole") == ["done"]
    assert not (run / "attempts.jsonl").exists()  # the run itself is not touched
