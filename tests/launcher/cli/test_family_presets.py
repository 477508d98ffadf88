"""The presets of transformers' families, planned and launched without torch on folders of published sizes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.config import load_config
from alignkd.config.presets import PAIRS, write_preset
from launcher.commands.plan import PlanRequest, plan_run
from launcher.commands.preflight import launch_problems
from launcher.plan.as_dict import plan_as_dict
from launcher.plan.check import check_memory
from launcher.plan.plan import GIB
from launcher.plan.roofline import CHIPS
from launcher.plan.show import show_plan
from launcher.plan.workload import Cluster
from tests.launcher.cli.command import alignkd
from tests.model_folders import change_json
from tests.published_families import PARAMETERS, write_model_folder

NODE = Cluster(1, 8)


def written(tmp_path: Path, name: str) -> Path:
    """The preset, with its models and data as far as a login node reads them."""
    for model in (PAIRS[name].teacher, PAIRS[name].student):
        write_model_folder(tmp_path / "checkpoints" / model, model)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "train.json").write_text("[]")
    write_preset(name, tmp_path / "alignkd.yaml")
    return tmp_path / "alignkd.yaml"


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_planned_and_may_be_launched(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    assert launch_problems(load_config(path), NODE.ranks) == []
    found = plan_run(PlanRequest(path, NODE.nodes, NODE.gpus_per_node, 80 * GIB))
    plan, values = found.plan, plan_as_dict(found.plan, found.gpu_memory, found.advised, CHIPS["h100"])
    for role, model in (("teacher", PAIRS[name].teacher), ("student", PAIRS[name].student)):
        assert values["parameters"][role] == PARAMETERS.get(model, values["parameters"][role]) > 10**8
    assert plan.sizes.notes == found.notes
    assert found.notes
    assert 0 < plan.work.vision_tokens <= plan.work.length // 2
    assert all(cost["flops"] >= 0 and cost["bytes"] > 0 for cost in values["roofline"]["costs"])
    written_out = io.StringIO()
    show_plan(plan, found.gpu_memory, found.advised, CHIPS["h100"], Console(file=written_out, width=80))
    assert "student's weights" in written_out.getvalue()
    problems, notes = check_memory(load_config(path), NODE, 80 * GIB)
    assert notes == []
    assert bool(problems) == (not plan.fits(80 * GIB))
    # Weights are gathered from the same bytes that the tensors have.
    sent = {transfer.name: transfer.bytes for transfer in plan.traffic}
    teacher = plan.sizes.teacher
    assert teacher is not None
    assert "teacher's head" not in sent  # gathered in the first step only
    kept = {part.name: part.bytes for part in plan.memory.parts}
    assert kept["teacher's head"] == teacher.head * 2
    assert sent["new weights"] == sum(plan.sizes.trainable(plan.config).values()) * 2


def test_the_command_plans_and_launches_a_pair_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "alignkd.yaml"
    name = "smolvlm2-500m-to-256m"  # whose checkpoints fit on any disk
    made = alignkd("init", "--preset", name, "--out", path)
    assert made.returncode == 0, made.stderr
    path.unlink()
    written(tmp_path, name)
    done = alignkd("plan", path, "--gpus-per-node", "8", "--gpu-memory", "80G")
    assert done.returncode in (0, 1), done.stderr
    assert done.is_light
    assert "half of data.max_length is assumed (1024)" in " ".join(done.stdout.split())
    one = ("--set", "checkpoint.keep_last=1")
    done = alignkd("launch", path, "--cpu", "--dry-run", "--backend", "local", *one)
    assert done.returncode == 0, done.stderr
    assert done.is_light


def test_models_whose_sizes_are_not_known_are_launched_unchecked(tmp_path: Path) -> None:
    path = written(tmp_path, "gemma-3-12b-to-4b")
    for model in (PAIRS["gemma-3-12b-to-4b"].teacher, PAIRS["gemma-3-12b-to-4b"].student):
        change_json(tmp_path / "checkpoints" / model / "config.json", model_type="gemma4")
    assert launch_problems(load_config(path), NODE.ranks) == []
    problems, (note,) = check_memory(load_config(path), NODE, 80 * GIB)
    assert problems == []
    assert note.startswith("memory was not checked: ")
    assert "the sizes of gemma4 models are not known to `alignkd plan`" in note
