"""The prediction beside a measured step is the plan's, of the samples that the benchmark makes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import predicted
from benchmarks.batches import VISION_TOKENS, Shape, random_window
from benchmarks.gpu.sizes import TINY_PAIR
from benchmarks.models import random_pair
from launcher.plan.roofline import CHIPS, Chip

CPU = torch.device("cpu")
SLOW = Chip("slow", peak=1e9, fp32=1e9, matmul=1e9, bandwidth=1e15)  # only operations take time


def test_the_work_is_that_of_the_batches() -> None:
    (batch,) = random_window(Shape("", (300, 300)), True, False, CPU)
    work = predicted.BatchWork(2, 300, VISION_TOKENS, accumulation=1, window=1)
    assert work.supervised == batch.counts.logits
    assert work.text_rows == batch.text_rows_IM.shape[1]
    assert work.tokens == batch.counts.tokens


def test_samples_of_any_lengths_add_up() -> None:
    teacher, student = random_pair(TINY_PAIR, torch.float32, CPU)

    def seconds(*lengths: int, chip: Chip = SLOW, again: bool = False) -> float:
        return predicted.predicted_seconds(teacher, student, Shape("", lengths), chip, again)

    assert seconds(200, 400, 400) == pytest.approx(seconds(200) + 2 * seconds(400))
    assert seconds(400) > 1.5 * seconds(200)
    assert seconds(400, again=True) > seconds(400)
    half = Chip("slower", peak=5e8, fp32=5e8, matmul=5e8, bandwidth=1e15)
    assert seconds(400, chip=half) == pytest.approx(2 * seconds(400))


def test_a_cpu_is_measured_and_a_gpu_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = predicted.chip_of(CPU, torch.float32)
    assert chip.name == "measured"
    assert chip.matmul == chip.fp32 == chip.peak > 0
    assert chip.bandwidth > 0
    assert "measured here" in predicted.describe(chip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert predicted.chip_of(torch.device("cuda"), torch.bfloat16) == CHIPS["h200"]
    assert "from the data sheet" in predicted.describe(CHIPS["h200"])
