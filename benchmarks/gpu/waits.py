"""Where the host waits for the device within an optimizer step: ours alone, and in a ZeRO-2 engine."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from alignkd.distributed.ranks import start_ranks
from benchmarks import report
from benchmarks.batches import random_window
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import timed
from benchmarks.methods import ours
from benchmarks.models import random_pair
from benchmarks.setting import Setting, new_setting
from launcher.backends.ranks import free_port

SHOWN_PLACES = 4


def measure(sizes: Sizes) -> Iterator[Row]:
    shape = sizes.shapes[-1]
    window = random_window(shape, True, False, torch.device("cpu"))
    if sizes.device.type == "cuda":
        window = [batch.pin_memory() for batch in window]  # as the loader does
    what = f"{shape.name}, {sizes.shallow.name}"
    yield _row(f"{what}, no engine", partial(ours, _setting(sizes), window), sizes)
    with _one_rank():
        for timer in (True, False):
            setting = _setting(sizes)
            step = partial(ours, setting, window, engine=_engine(setting, timer, sizes))
            yield _row(f"{what}, ZeRO-2, throughput timer {'on' if timer else 'off'}", step, sizes)


def _setting(sizes: Sizes) -> Setting:
    """A new one for each engine: engines leave hooks in their module."""
    return new_setting(*random_pair(sizes.shallow, sizes.dtype, sizes.device), sizes.device)


def _row(what: str, step: Callable[[], object], sizes: Sizes) -> Row:
    taken = timed(step, sizes.device, sizes.rounds)
    waits = count_waits(step)
    return {
        "what": what,
        "ms": taken.device_ms,
        "host ms": taken.host_ms,
        "synchronize()": waits.pop("synchronize", 0),
        "values read": sum(waits.values()),
        "where": ", ".join(f"{place} ({count})" for place, count in waits.most_common(SHOWN_PLACES)),
    }


def count_waits(step: Callable[[], object]) -> Counter[str]:
    """``synchronize``: explicit calls; every other key is a line that waited for the device, as torch's
    synchronisation debug mode reports it (on CUDA only)."""
    waits: Counter[str] = Counter()

    def counted(*_: Any, **__: Any) -> None:
        waits["synchronize"] += 1

    with (
        patch.object(get_accelerator(), "synchronize", counted),
        patch.object(torch.cuda, "synchronize", counted),
        warnings.catch_warnings(record=True) as caught,
        _reported_waits(),
    ):
        warnings.simplefilter("always")
        step()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            waits[f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"] += 1
    return waits


@contextmanager
def _reported_waits() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _engine(setting: Setting, throughput_timer: bool, sizes: Sizes) -> Any:
    config = json.loads((report.ROOT / "ds_configs" / "student_stage2.json").read_text(encoding="utf-8"))
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "timers": {"throughput": {"enabled": throughput_timer}},
    }
    if sizes.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    trained = [parameter for parameter in setting.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    return deepspeed.initialize(model=setting.module, optimizer=optimizer, config=config)[0]


@contextmanager
def _one_rank() -> Iterator[None]:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with patch.dict(os.environ, {**alone, "MASTER_PORT": str(free_port())}):
        # DeepSpeed parses the command line of whoever imports it.
        with patch.object(sys, "argv", sys.argv[:1]):
            start_ranks()
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
