"""``alignkd plan``, and the memory check of ``alignkd launch``, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.config import load_config
from tests.launcher.cli.command import alignkd
from tests.launcher.conftest import FIXTURE
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES

GPUS = ("--set", "slurm.gpu_option=gres")


@pytest.fixture
def published_sizes(config_file: Path, tmp_path: Path) -> list[str]:
    """Arguments for the 7B teacher and the 1.7B student; a plan needs no weights."""
    arguments = []
    for key, (_, shape, _) in (("teacher", SIZES[2]), ("student", SIZES[0])):
        folder = tmp_path / key
        folder.mkdir()
        values = PUBLISHED | dict(zip(SHAPE_KEYS, shape, strict=True))
        (folder / "config.json").write_text(json.dumps(values))
        arguments += ["--set", f"model.{key}={folder}"]
    return [*arguments, "--set", "training.precision=bf16", "--set", "training.global_batch_size=128"]


def test_the_tables_fit_80_columns(config_file: Path, published_sizes: list[str]) -> None:
    cluster = ("--nodes", 2, "--gpus-per-node", 8)
    done = alignkd("plan", config_file, *published_sizes, *cluster, "--gpu-memory", "80G")
    assert done.returncode == 0, done.stderr
    assert done.is_light
    assert max(map(len, done.stdout.splitlines())) <= 80
    for part in (
        "7,062.9",
        "1,674.1",
        "teacher shard",
        "fits into 80.00",
        "zero3_node",
        "On h100, 989 TFLOP/s, without any waiting: at least",
        "Largest costs:",
        "  teacher's matrix products: ",
    ):
        assert part in done.stdout
    unknown = alignkd("plan", config_file, *published_sizes, *cluster, "--chip", "b200")
    assert "On b200, 2,250 TFLOP/s" in unknown.stdout
    assert "nothing was checked" in unknown.stdout
    assert "Advice" not in unknown.stdout


def test_apply_writes_the_advice_and_the_overrides_into_the_file(
    config_file: Path, published_sizes: list[str]
) -> None:
    # One GPU of 40 GiB: the student's optimizer alone is 22 GB, so something must be offloaded.
    arguments = ("plan", config_file, *published_sizes, "--gpu-memory", "40G", "--json", "--apply")
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
    # The advice was computed for the overrides, so the file has these, too.
    again = alignkd("plan", config_file, "--gpu-memory", "40G", "--json", "--apply")
    values = json.loads(again.stdout)
    assert values["parameters"]["teacher"] == 7_062_943_744
    assert values["advice"] == {}
    assert values["memory"]["fits"] is True
    assert "already set, nothing was written" in again.stderr


def test_apply_writes_a_path_as_set_resolved_it(config_file: Path, tmp_path: Path) -> None:
    """Paths of --set are relative to the current folder, those in a file to the file's folder."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "student").symlink_to(FIXTURE / "student")
    change = ("--set", "model.student=student", "--set", "training.micro_batch_size=1")
    done = alignkd("plan", config_file, *change, "--gpu-memory", "80G", "--apply", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert load_config(config_file).model.student == str(elsewhere / "student")
    assert "  model.student: " in done.stdout


def test_a_stage_can_be_planned_before_the_one_that_trains_its_models(tmp_path: Path) -> None:
    """pretrain -> finetune -> again: a trained model has the shape of the one that training started from."""
    stages = tmp_path / "stages.yaml"
    (tmp_path / "plain").mkdir()
    values = json.loads((FIXTURE / "student" / "config.json").read_text())
    plain = {key: value for key, value in values.items() if not key.startswith("mm_")} | {
        "model_type": "llama"
    }
    (tmp_path / "plain" / "config.json").write_text(json.dumps(plain))
    stages.write_text(
        f"model: {{teacher: {FIXTURE / 'teacher'}, student: plain}}\n"
        "data: {sources: [{file: data.json}]}\n"
        "training: {global_batch_size: 8, micro_batch_size: 2, precision: fp32}\n"
        "stages:\n"
        f"  one: {{run: {{name: one}}, model: {{vision_tower: {FIXTURE / 'teacher'}}}}}\n"
        "  two: {run: {name: two}, model: {student: runs/one/student}}\n"
        "  three: {run: {name: three}, model: {student: runs/two/student, teacher: runs/two/student}}\n"
        "  unfit: {run: {name: two}, training: {learning_rate: -1}}\n"
    )
    alone = alignkd("plan", stages, "--stage", "two", "--json")
    assert alone.returncode == 2  # an invalid stage is reported whichever stage is planned
    assert "stages.unfit.training.learning_rate" in alone.stderr
    stages.write_text("\n".join(stages.read_text().splitlines()[:-1]))
    first, second, third = (
        alignkd("plan", stages, "--stage", stage, "--json") for stage in ("one", "two", "three")
    )
    sizes = [json.loads(done.stdout)["parameters"] for done in (first, second, third)]
    assert sizes[0] == sizes[1]
    assert sizes[2]["teacher"] == sizes[2]["student"] == sizes[0]["student"]
    assert "note:" not in first.stderr
    assert "run one will write it, in the shape of " + str(tmp_path / "plain") in second.stderr
    assert third.stderr.count("run two will write it") == 2
    shown = alignkd("plan", stages, "--stage", "two")
    assert "note: model.student = " in shown.stdout
    # No stage writes this one.
    unknown = alignkd("plan", stages, "--stage", "two", "--set", "model.student=runs/zero/student")
    assert unknown.returncode == 2
    assert "zero/student/config.json: no such file" in unknown.stderr


def test_launch_refuses_a_run_that_cannot_fit(config_file: Path, tmp_path: Path) -> None:
    # GPUs of other hosts are not looked for; the tiny models need less than 3 GiB, mostly overhead.
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    launch = ("launch", config_file, "--hostfile", tmp_path / "hosts", "--dry-run", *GPUS)
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
    assert "not a memory size" in alignkd(*launch, "--gpu-memory", "much").stderr


def test_the_memory_of_a_run_on_the_cpu_is_not_checked(config_file: Path) -> None:
    done = alignkd("launch", config_file, "--backend", "local", "--dry-run", "--gpu-memory", "1M", "--cpu")
    assert done.returncode == 0, done.stderr
    assert "memory was not checked" not in done.stdout
