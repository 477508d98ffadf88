"""What is found out before a job is submitted, and what a dry run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.runs import Runs


def test_all_problems_are_reported_at_once(runs: Runs, cluster: Cluster) -> None:
    text = runs.alignkd(
        *("launch", runs.config, "--backend", "slurm", "--nodes", 64),
        *("--set", "slurm={partition: short, time_limit: '0:20:00', signal_seconds: 1170, activate: 'if ('}"),
        *("--set", "data.sources.0.file=missing.json", "--set", "model.teacher=/nowhere"),
        code=2,
    )
    for part in (
        *("missing.json: no such file", "/nowhere: no such folder", "over 64 ranks", "has 4 nodes"),
        *("at most 5 minutes", "signal_seconds = 1170", "env.sh: bash cannot parse it (slurm.activate?)"),
    ):
        assert part in text
    assert not (runs.folder / "runs").exists()
    assert cluster.run("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("slurm.partition=gpus", "sbatch refuses the job: "),
        ("slurm.gpu_type=a100", "sbatch refuses the job: "),
        ("slurm.cpus_per_task=99", "sbatch refuses the job: "),
        ("slurm.sbatch_options={no-such-option: 1}", "sbatch refuses the job: "),
    ],
)
def test_what_slurm_refuses_is_an_error_before_submission(runs: Runs, setting: str, message: str) -> None:
    text = runs.alignkd("launch", runs.config, "--backend", "slurm", "--set", setting, code=2)
    assert message in text
    assert not (runs.folder / "runs").exists()


@pytest.mark.parametrize("style", ["gpus-per-node", "gres"])
def test_gpus_are_asked_for_in_the_way_of_the_site(runs: Runs, cluster: Cluster, style: str) -> None:
    """Two ranks on a node see both of its (pretended) GPUs, as torch wants it."""
    run = runs.prepare(nodes=1, gpus_per_node=2, slurm={"gpu_option": style}, steps=2)
    job = runs.submit(run)
    assert runs.wait_for_end(job) == "COMPLETED", runs.log(run)
    assert "TresPerNode=gres:gpu:2" in cluster.run("scontrol", "show", "job", "-o", job)
    for rank in range(2):
        assert "sees GPUs 0,1" in (run / "logs" / f"rank-{rank}.log").read_text()


def test_a_site_profile_lies_under_the_configuration(runs: Runs, tmp_path: Path) -> None:
    site = tmp_path / "xdg" / "alignkd" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("slurm: {partition: short, time_limit: '4', account: me}\n")
    variables = {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    arguments = ("launch", runs.config, "--backend", "slurm", "--dry-run", "--set", "slurm.account=you")
    runs.alignkd(*arguments, "--set", "slurm.signal_seconds=30", **variables)
    script = (tmp_path / "runs" / "run" / "job.sbatch").read_text()
    assert "#SBATCH --partition=short\n" in script
    assert "#SBATCH --account=you\n" in script
    site.write_text("slurm: {partion: short}\n")
    assert "slurm.partion: unknown key" in runs.alignkd(*arguments, "--name", "b", code=2, **variables)
