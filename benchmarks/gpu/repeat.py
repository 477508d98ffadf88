"""The same step twice: equal to the last bit or not, and what determinism costs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from alignkd.data.batch import Batch
from benchmarks.batches import random_window
from benchmarks.gpu.packed import WAYS, attending
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import timed
from benchmarks.methods import ours
from benchmarks.models import random_pair
from benchmarks.setting import Setting, new_setting

Results = dict[str, torch.Tensor]


def measure(sizes: Sizes) -> Iterator[Row]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else determinism refuses matrix products
    setting = new_setting(*random_pair(sizes.shallow, sizes.dtype, sizes.device), sizes.device)
    if sizes.checkpointing:
        setting.student.enable_gradient_checkpointing()
    shape = sizes.shapes[-1]
    window = random_window(shape, True, False, sizes.device)
    for way, loop, cudnn in WAYS:
        for deterministic in (False, True):
            mode = "deterministic algorithms" if deterministic else "usual algorithms"
            what = f"{shape.name}, {sizes.shallow.name}, {way}, {mode}"
            with attending(loop, cudnn), _determinism(deterministic):
                try:
                    yield {"what": what, **_compared(setting, window, sizes)}
                except RuntimeError as error:  # an operation without a deterministic form
                    yield {"what": what, "note": str(error).splitlines()[0][:200]}


def _compared(setting: Setting, window: list[Batch], sizes: Sizes) -> Row:
    first, second = (_step(setting, window) for _ in range(2))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    losses = [name for name in differing if name.startswith("loss of ")]
    errors = [
        float((second[name].float() - first[name].float()).norm() / first[name].float().norm())
        for name in differing
    ]
    taken = timed(partial(_step, setting, window), sizes.device, sizes.rounds)
    return {
        "bitwise equal": not differing,
        "losses that differ": len(losses),
        "gradients that differ": len(differing) - len(losses),
        "of": sum(not name.startswith("loss of ") for name in first),
        "largest difference": max(errors, default=0.0),
        "ms": taken.device_ms,
    }


def _step(setting: Setting, window: list[Batch]) -> Results:
    """Losses and gradients of one step."""
    setting.forget_gradients()
    losses = {f"loss of {name}": value for name, value in ours(setting, window).items()}
    gradients = {
        name: parameter.grad
        for name, parameter in setting.module.named_parameters()
        if parameter.grad is not None
    }
    return losses | gradients


@contextmanager
def _determinism(enabled: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
