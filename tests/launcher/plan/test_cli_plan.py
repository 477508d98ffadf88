"""``alignkd plan`` and what ``alignkd launch`` makes of it, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.test_cli import alignkd, is_light
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES


@pytest.fixture
def true_sizes(config_file: Path, tmp_path: Path) -> list[str]:
    """Arguments for the 7B teacher and the 1.7B student, which need no weights to be planned."""
    arguments = []
    for key, (_, shape, _) in (("teacher", SIZES[2]), ("student", SIZES[0])):
        folder = tmp_path / key
        folder.mkdir()
        values = PUBLISHED | dict(zip(SHAPE_KEYS, shape, strict=True))
        (folder / "config.json").write_text(json.dumps(values))
        arguments += ["--set", f"model.{key}={folder}"]
    return [*arguments, "--set", "training.precision=bf16", "--set", "training.global_batch_size=128"]


def test_a_table_of_80_columns(config_file: Path, true_sizes: list[str]) -> None:
    cluster = ("--nodes", 2, "--gpus-per-node", 8)
    done = alignkd("plan", config_file, *true_sizes, *cluster, "--gpu-memory", "80G")
    assert done.returncode == 0, done.stderr
    assert is_light(done)
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in (
        "7,062.9",
        "1,674.1",
        "teacher shard",
        "fits into 80.00",
        "zero3_node",
        "Assumed 989 TFLOP/s per GPU at 40%",
    ):
        assert part in done.stdout
    unknown = alignkd("plan", config_file, *true_sizes, *cluster)
    assert "nothing was checked" in unknown.stdout
    assert "Advice" not in unknown.stdout


def test_json_and_apply(config_file: Path, true_sizes: list[str]) -> None:
    # One GPU of 40 GiB: the student's optimizer alone is 22 GB, so something must go to host memory.
    arguments = ("plan", config_file, *true_sizes, "--gpu-memory", "40G", "--json", "--apply")
    done = alignkd(*arguments)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["parameters"]["teacher"] == 7_062_943_744
    assert values["memory"]["needed"] > values["memory"]["tensors"] > 0
    assert values["memory"]["fits"] is False
    assert values["advice"]["student.offload"] is True
    text = config_file.read_text()
    for key, value in values["advice"].items():
        assert f"{key.split('.')[1]}: {str(value).lower() if isinstance(value, bool) else value}" in text
    again = json.loads(alignkd(*arguments).stdout)
    assert again["advice"] == {}
    assert again["memory"]["fits"] is True


def test_launch_refuses_what_cannot_fit(config_file: Path, tmp_path: Path) -> None:
    # On other hosts nobody looks for GPUs; the tiny models need less than 3 GiB, mostly for the driver.
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    launch = ("launch", config_file, "--backend", "ssh", "--hostfile", tmp_path / "hosts", "--dry-run")
    refused = alignkd(*launch, "--gpu-memory", "1G")
    assert refused.returncode == 2
    assert "does not fit into 1.00" in refused.stderr
    assert "--skip-memory-check" in refused.stderr
    assert not (tmp_path / "runs").exists()
    configured = alignkd(*launch, "--set", "slurm.gpu_memory=1G")
    assert "does not fit into 1.00" in configured.stderr
    for arguments, said in (
        (("--gpu-memory", "1G", "--skip-memory-check"), False),
        (("--gpu-memory", "80G"), False),
        ((), True),
    ):
        done = alignkd(*launch, *arguments, "--name", f"run-{len(arguments)}")
        assert "does not fit" not in done.stderr
        assert ("memory was not checked" in done.stdout) == said
    assert "not a size of memory" in alignkd(*launch, "--gpu-memory", "much").stderr


def test_a_run_on_the_cpu_is_not_checked(config_file: Path) -> None:
    done = alignkd("launch", config_file, "--backend", "local", "--dry-run", "--gpu-memory", "1M")
    assert done.returncode == 0, done.stderr
    assert "memory was not checked" not in done.stdout
