"""Whole runs in real ranks: a run folder in, metrics, checkpoints and a student out."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkd.checkpoint.resume import CheckpointSearch, find_checkpoint
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import AlignkdError
from alignkd.run_folder import verification
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.ranks import RankPool


class StopAfter(StopRequest):
    """A signal that arrives during one optimizer step, on one rank."""

    def __init__(self, steps: int, signal: str) -> None:
        super().__init__()
        self._edges, self._steps, self._signal = 0, steps, signal

    def _seen(self, signal: str) -> bool:
        return self._signal == signal and self._edges > self._steps

    @property
    def usr1(self) -> bool:
        self._edges += 1  # read once per step edge
        return self._seen("usr1")

    @usr1.setter
    def usr1(self, _value: bool) -> None: ...

    @property
    def term(self) -> bool:
        return self._seen("term")

    @term.setter
    def term(self, _value: bool) -> None: ...


def train_run(ranks: Ranks, run: str, stop_after: int | None = None, signal: str = "usr1") -> int | str:
    """Exit code, or the message of an error that every rank raises."""
    stop = (
        StopAfter(stop_after, signal)
        if stop_after is not None and ranks.rank == ranks.world_size - 1
        else StopRequest()
    )
    progress = Progress(Path(run), writes=ranks.is_first)
    try:
        return Trainer(prepare(Path(run), ranks, progress), stop, progress).train()
    except AlignkdError as error:
        return str(error)


def same_but_for_times(run: Path, other: Path) -> None:
    ours, theirs = tiny.metrics_rows(run), tiny.metrics_rows(other)
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert {name for name in expected if mine[name] != expected[name]} <= tiny.TIMES
    weights, expected_weights = (
        load_file(run / "student/model.safetensors"),
        load_file(other / "student/model.safetensors"),
    )
    assert weights.keys() == expected_weights.keys()
    assert all(weights[name].equal(expected_weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("stage", "precision", "placement"),
    [
        (0, "fp32", "replicated"),
        (1, "bf16", "zero3"),
        (2, "fp32", "zero3"),
        (2, "bf16", "zero3"),
        (3, "bf16", "zero3"),
        (3, "fp32", "replicated"),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    two_ranks: RankPool, tmp_path: Path, stage: int, precision: str, placement: str
) -> None:
    changes = {
        "student__zero_stage": stage,
        "training__precision": precision,
        "teacher__placement": placement,
    }
    whole = tiny.write_run(tmp_path / "whole", 2, **changes)
    assert two_ranks.run(train_run, str(whole)) == [0, 0]
    stopped = tmp_path / "stopped"
    tiny.copy_untrained(whole, stopped)
    assert two_ranks.run(train_run, str(stopped), 3, "usr1") == [85, 85]
    assert committed_steps(stopped) == [3, 2]
    assert json.loads((stopped / "result.json").read_text())["status"] == "stopped"
    assert not (stopped / "student").exists()
    # Rows after the checkpoint, as a killed run leaves them, are written again.
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.0}) + '\n{"step": 5, "lo')
    assert two_ranks.run(train_run, str(stopped)) == [0, 0]
    same_but_for_times(stopped, whole)


def documented_columns() -> set[str]:
    manual = (Path(__file__).parents[2] / "docs" / "using.md").read_text()
    table = manual.partition("## metrics.jsonl")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_rows_have_the_documented_columns_and_the_result_sums_them_up(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, training__epochs=2, training__warmup_ratio=0.25)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    rows = tiny.metrics_rows(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["samples"] for row in rows] == list(range(8, 65, 8))
    assert rows[-1]["epoch"] == 2.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        terms = row["ce"] + row["reverse_kl"] + row["attention"] + row["vision"]
        assert row["loss"] == pytest.approx(terms)
        shares = [row[f"{part}_seconds_share"] for part in ("teacher", "student", "optimizer")]
        assert min(shares) > 0
        assert sum(shares) + row["data_wait_share"] < 1  # none is counted twice
        assert 0 < row["data_wait_share"] < 1
        assert row["gradient_norm"] > 0
        assert row["skipped_samples"] == row["padding_share"] == 0
        assert all(math.isfinite(value) for value in row.values())
    assert all(set(row) == documented_columns() for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(5e-4)  # warm-up over two of eight steps
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["step"], result["first"], result["last"]) == (
        "done",
        8,
        rows[0],
        rows[-1],
    )
    assert len(result["peak_memory_bytes_per_rank"]) == 2
    assert json.loads((run / "progress.json").read_text())["phase"] == "done"


def test_term_saves_once_and_exits_86(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, checkpoint__every=100)
    assert two_ranks.run(train_run, str(run), 1, "term") == [86, 86]
    assert committed_steps(run) == [1]


def test_fifty_steps_of_mixed_batches_do_not_hang(two_ranks: RankPool, tmp_path: Path) -> None:
    """Ragged, text-only and empty micro-batches on one rank while the other has images."""
    for stage in (2, 3):
        run = tiny.write_run(
            tmp_path / f"stage{stage}",
            2,
            student__zero_stage=stage,
            training__global_batch_size=6,  # of 32: an epoch's last step leaves ranks without any
            training__micro_batch_size=1,
            training__epochs=9,
            training__max_steps=50,
            checkpoint__every=1000,
        )
        assert two_ranks.run(train_run, str(run)) == [0, 0]
        assert len(tiny.metrics_rows(run)) == 50


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    poisoned = tmp_path / "models" / "student"
    shutil.copytree(tiny.STUDENT, poisoned)
    shutil.copytree(tiny.FOLDER / "openai", tmp_path / "models" / "openai")
    weights = torch.load(poisoned / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"][7, 3] = math.nan
    torch.save(weights, poisoned / "pytorch_model.bin")
    run = tiny.write_run(tmp_path / "run", 2, model__student=str(poisoned), checkpoint__every=1)
    for message in two_ranks.run(train_run, str(run)):
        assert "step 1: the loss is not finite" in str(message)
    assert committed_steps(run) == []


def find(ranks: Ranks, run: str) -> CheckpointSearch:
    return find_checkpoint(Path(run), ranks, keep_last=3)


def test_a_damaged_checkpoint_is_kept_aside_when_its_step_is_saved_again(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    shard = RunPaths(run).checkpoints / "step-4" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    assert committed_steps(run) == [4, 2]
    assert (RunPaths(run).checkpoints / "step-4.passed-over" / "mp_rank_00_model_states.pt").is_file()
    assert two_ranks.run(find, str(run))[0].verified == (4, 2)


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    for message in two_ranks.run(train_with_a_failing_disk, str(run)):
        assert "step-4: cannot be read: rank 1" in str(message)
    assert committed_steps(run) == [4, 2]


def train_with_a_failing_disk(ranks: Ranks, run: str) -> int | str:
    """An input/output error on one rank, which says nothing about the checkpoint."""

    def failing(_folder: Path, name: str) -> dict[str, Any]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(verification, "describe", failing)
        return train_run(ranks, run)


def test_a_global_batch_of_bad_samples_stops_the_run(two_ranks: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 2, data__on_bad_sample="skip")
    config = (run / "config.yaml").read_text()
    (tmp_path / "empty").mkdir()
    (run / "config.yaml").write_text(config.replace(str(tiny.FOLDER) + "\n", str(tmp_path / "empty") + "\n"))
    text_free = json.loads((run / "v1.json").read_text())
    (run / "v1.json").write_text(json.dumps([record for record in text_free if "image" in record]))
    for message in two_ranks.run(train_run, str(run)):
        assert "samples of a global batch were bad" in str(message)
    assert committed_steps(run) == []


def test_without_distillation_the_loss_is_the_cross_entropy_and_a_tower_can_be_trained(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, distillation__enabled=False, training__train_vision_tower=True)
    before = torch.load(tiny.STUDENT / "pytorch_model.bin", weights_only=True)
    assert two_ranks.run(train_run, str(run)) == [0, 0]
    row = tiny.metrics_rows(run)[-1]
    assert row["loss"] == row["ce"]
    after = load_file(run / "student" / "model.safetensors")
    tower = [name for name in after if "vision_tower" in name]
    assert any(not after[name].equal(before[name]) for name in tower)
