"""Two stages as dependent jobs: the second starts when the first is done, and not before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import Runs


def launch(runs: Runs, plan: dict[str, object], **slurm: object) -> list[tuple[Path, str]]:
    """Submit both stages, held until the toy's plan is there: (run, job) of each."""
    result = submit(runs, {**slurm, "sbatch_options": {"hold": True}})
    pairs = [(Path(stage["run"]), stage["job"]) for stage in result["stages"]]
    runs.plan(pairs[0][0], **plan)
    runs.plan(pairs[1][0])
    for run, job in pairs:
        # A chained or resumed job must not be held again.
        script = run / "job.sbatch"
        script.write_text(script.read_text().replace("#SBATCH --hold\n", ""))
        runs.cluster.run("scontrol", "release", job)
    return pairs


def submit(runs: Runs, slurm: dict[str, object], code: int = 0, **variables: str) -> Any:
    """Launch two stages with ``--json``."""
    text = runs.config.read_text()
    stages = (
        "stages:\n"
        "  pretrain: {run: {name: one}}\n"
        f"  finetune: {{run: {{name: two}}, model: {{student: {runs.folder}/runs/one/student}}}}\n"
    )
    runs.config.write_text(text + stages)
    return json.loads(
        runs.alignkd(
            *("launch", runs.config, "--backend", "slurm", "--nodes", 1, "--stages", "pretrain,finetune"),
            *("--set", f"slurm={json.dumps(runs.site(slurm))}", "--json"),
            code=code,
            **variables,
        )
    )


def test_the_second_stage_follows_the_first(runs: Runs) -> None:
    (one, first), (two, second) = launch(runs, {"hold": [5]})
    wait_for(lambda: runs.json("status", two)["detail"] == "waits for another job", "the reason")
    runs.wait_for_step(one, 5)
    runs.cluster.run("scancel", "--signal=USR1", first)  # as before its time limit
    assert runs.wait_for_end(second) == "COMPLETED", runs.log(two)
    assert runs.reasons(one) == ["time limit", "done"]
    assert runs.attempts(one)[1].end <= runs.attempts(two)[0].start  # type: ignore[operator]
    assert runs.attempts(one)[1].job == first


def test_a_failed_stage_holds_the_next_until_it_is_resumed(runs: Runs) -> None:
    failures = [{"attempt": 1, "rank": 0, "step": 2, "code": 2}]
    (one, first), (two, second) = launch(runs, {"failures": failures})
    assert runs.wait_for_end(first) == "FAILED"
    wait_for(
        lambda: runs.json("status", two)["detail"].startswith("the job that it waits for has failed"), "it"
    )
    runs.alignkd("resume", one)
    assert runs.wait_for_end(second) == "COMPLETED", runs.log(two)
    assert runs.reasons(one) == ["configuration error", "done"]


def test_a_chained_stage_still_holds_the_next(runs: Runs, cluster: Cluster) -> None:
    failures = [{"attempt": 1, "rank": 0, "step": 6, "code": 3}]
    (one, _), (two, second) = launch(runs, {"failures": failures, "steps": 12}, requeue=False)
    assert runs.wait_for_end(second) == "COMPLETED", runs.log(one) + runs.log(two)
    assert runs.reasons(one) == ["crashed", "done"]
    assert runs.attempts(one)[1].end <= runs.attempts(two)[0].start  # type: ignore[operator]


def test_a_stage_that_sbatch_refuses_is_submitted_later_and_waits_for_the_first(
    runs: Runs, cluster: Cluster
) -> None:
    """The first is on its way by then: its job must be known, and the second must wait for it."""
    folder = runs.folder / "refusing"
    folder.mkdir()
    (folder / "sbatch").write_text(
        '#!/bin/bash\nif [[ $* == *dependency* ]]; then echo "job limit reached" >&2; exit 1; fi\n'
        f'exec {shutil.which("sbatch")} "$@"\n'
    )
    (folder / "sbatch").chmod(0o755)
    result = submit(runs, {"sbatch_options": {"hold": True}}, code=1, PATH=f"{folder}:{os.environ['PATH']}")
    (one, two), (first, second) = ([stage[key] for stage in result["stages"]] for key in ("run", "job"))
    assert (cluster.state(first), second) == ("PENDING", None)
    assert "job limit reached" in result["stages"][1]["error"]
    second = runs.json("resume", two)["job"]
    assert cluster.job(second)["Dependency"].startswith(f"afterok:{first}")
    runs.alignkd("cancel", one)
    runs.alignkd("cancel", two)
    assert f"first: alignkd resume {one}" in runs.alignkd("resume", two, code=2)


def test_impossible_stages_are_refused(runs: Runs) -> None:
    runs.config.write_text(runs.config.read_text() + "stages: {a: {}, b: {}}\n")
    arguments = ("launch", runs.config, "--backend", "slurm", "--dry-run", "--stages")
    assert "have the same run.name" in runs.alignkd(*arguments, "a,b", code=2)
    assert "--name names a single run" in runs.alignkd(*arguments, "a,b", "--name", "x", code=2)
    assert "no such stage" in runs.alignkd(*arguments, "a,c", code=2)
