"""Weights that sit where they belong after a load, or no training at all."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkd.checkpoint.placement import check_placement, weight_digests
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import EXIT_OK, EXIT_USER_ERROR, AlignkdError, CheckpointError
from alignkd.run_folder import layout
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.ranks import RankPool


def train_run(ranks: Ranks, run: str, unchecked: bool = False) -> tuple[int, str]:
    """Exit code and message. ``unchecked``: as if nothing had been known to decide the layout."""
    progress = Progress(Path(run), writes=ranks.is_first)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if unchecked:
                patch.setattr(layout, "_HARMLESS", ("",))
            state = prepare(Path(run), ranks, progress)
        return Trainer(state, StopRequest(), progress).train(), ""
    except AlignkdError as error:
        return error.exit_code, str(error)


class Swapped:
    """An optimizer whose fp32 weights are the model's, except that two were swapped."""

    def __init__(self, weights: torch.Tensor) -> None:
        masters = weights.float().clone()
        masters[:2] = masters[:2].flip(0)
        self.fp16_groups_flat, self.fp32_groups_flat = [weights, weights], [weights.float(), masters]


def messages_of_a_check(ranks: Ranks) -> list[str]:
    """What rank 1's own mistakes make of a check, on this rank."""
    weights = torch.arange(10_000, dtype=torch.bfloat16)
    module = torch.nn.ParameterDict(
        {"a": weights.clone(), "b": torch.zeros(3), "c": torch.ones(()), "d": torch.ones(7)}
    )
    expected = weight_digests(module, ranks)
    sound = SimpleNamespace(module=module, optimizer=torch.optim.SGD(module.values()))
    check_placement(sound, expected, ranks)
    check_placement(sound, None, ranks)
    said = []
    for name in ("a", "b", "c", "d", "optimizer"):
        wrong = SimpleNamespace(module=copy.deepcopy(module), optimizer=sound.optimizer)
        if ranks.rank == 1 and name == "optimizer":
            wrong.optimizer = Swapped(weights)
        elif ranks.rank == 1:
            wrong.module[name].data.view(-1)[0] += 1
        with pytest.raises(CheckpointError) as caught:
            check_placement(wrong, expected, ranks)
        said.append(str(caught.value))
    return said


def test_one_rank_with_a_weight_in_the_wrong_place_stops_all(two_ranks: RankPool) -> None:
    for messages in two_ranks.run(messages_of_a_check):
        for name, message in zip("abcd", messages[:4], strict=True):
            assert f"rank 1: 1 of 4 parameters are not those that were saved: {name}" in message
        assert "the optimizer's fp32 weights are not the model's in parameter group 1" in messages[4]


def initial_digests(ranks: Ranks, run: str) -> dict[str, str]:
    return weight_digests(prepare(Path(run), ranks, Progress(Path(run), writes=False)).engine.module, ranks)


def test_the_fingerprint_is_the_same_at_any_stage_and_number_of_ranks(
    one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    found = []
    for pool, stage in ((one_rank, 0), (two_ranks, 2), (two_ranks, 3)):
        run = tiny.write_run(
            tmp_path / f"stage-{stage}",
            pool.world_size,
            student__zero_stage=stage,
            training__precision="bf16",
        )
        found += pool.run(initial_digests, str(run))
    assert len(found[0]) > 20
    assert all(one == found[0] for one in found)


def change_deepspeed(run: Path, section: str, key: str, value: Any) -> None:
    path = RunPaths(run).student_deepspeed
    settings = json.loads(path.read_text())
    (settings[section] if section else settings)[key] = value
    path.write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2, four steps, checkpoints of 3 and 4."""
    run = tiny.write_run(
        tmp_path_factory.mktemp("whole") / "run", 2, checkpoint__every=3, student__zero_stage=2
    )
    assert two_ranks.run(train_run, str(run)) == [(EXIT_OK, "")] * 2
    return run


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run, killed behind step 3."""
    ignored = shutil.ignore_patterns("step-4", "student", "result.json", "progress.json")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=ignored))


def assert_not_trained(run: Path, whole: Path) -> None:
    assert committed_steps(run) == [3]
    assert tiny.metrics_rows(run) == tiny.metrics_rows(whole)


def test_a_key_that_moves_the_shards_is_refused_by_its_name(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    change_deepspeed(stopped, "zero_optimization", "round_robin_gradients", True)
    for code, message in two_ranks.run(train_run, str(stopped)):
        assert code == EXIT_USER_ERROR
        assert "zero_optimization.round_robin_gradients: the checkpoint has None, the run has True" in message
    assert_not_trained(stopped, whole)


def test_weights_that_a_load_puts_elsewhere_end_all_ranks(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    """Whatever the reason, also one that nobody has thought of."""
    change_deepspeed(stopped, "zero_optimization", "round_robin_gradients", True)
    for code, message in two_ranks.run(train_run, str(stopped), True):
        assert code == EXIT_USER_ERROR
        assert "its weights are not where they belong" in message
    assert_not_trained(stopped, whole)


def test_a_key_that_does_not_move_them_is_named_and_accepted(
    two_ranks: RankPool, whole: Path, stopped: Path
) -> None:
    change_deepspeed(stopped, "", "gradient_clipping", 1000.0)
    assert two_ranks.run(train_run, str(stopped)) == [(EXIT_OK, "")] * 2
    said = "ds/student.json: gradient_clipping: the checkpoint has 1.0, the run has 1000.0"
    assert all(said in two_ranks.log(rank) for rank in (0, 1))
    assert committed_steps(stopped)[0] == 4


def test_the_manifest_says_what_decides_the_layout(whole: Path) -> None:
    manifest = read_manifest(step_folder(whole, 3))
    assert manifest["layout"]["deepspeed"]["zero_optimization.stage"] == 2
    parameters = [one for group in manifest["layout"]["groups"] for one in group]
    assert {name for name, _ in parameters} == manifest["weights"].keys()
    assert len(parameters) == len(manifest["weights"]) > 20
    (shape,) = [shape for name, shape in parameters if name == "student.head.weight"]
    assert len(shape) == 2
    assert {"torch", "deepspeed"} <= manifest["versions"].keys()
