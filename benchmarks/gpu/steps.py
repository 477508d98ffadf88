"""A whole step of the product against its floor: time, memory, kernels, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from alignkd.data.batch import Batch
from benchmarks import chips
from benchmarks.batches import Shape, random_window
from benchmarks.gpu.packed import attending
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Timed, first_call_ms, kernels, median_of, once
from benchmarks.measure import step_memory
from benchmarks.methods import METHODS
from benchmarks.models import random_pair
from benchmarks.setting import Setting, new_setting


@dataclass(frozen=True)
class Way:
    name: str
    method: str  # of benchmarks.methods
    loop: bool = False  # over packed samples
    cudnn: bool = False  # whether attention may choose it


FLOOR = Way("floor", "floor")
WAYS = (
    FLOOR,
    Way("ours", "ours"),
    Way("ours, loop", "ours", loop=True),
    Way("floor, cuDNN", "floor", cudnn=True),
    Way("ours, loop, cuDNN", "ours", loop=True, cudnn=True),
)


def measure(sizes: Sizes) -> Iterator[Row]:
    setting = new_setting(*random_pair(sizes.pair, sizes.dtype, sizes.device), sizes.device)
    if sizes.checkpointing:
        setting.student.enable_gradient_checkpointing()
    for shape in sizes.shapes:
        yield from _rows(setting, shape, sizes)


def _rows(setting: Setting, shape: Shape, sizes: Sizes) -> Iterator[Row]:
    device = sizes.device
    packed, padded = (random_window(shape, packing, False, device) for packing in (True, False))
    steps = {
        way: partial(_step, setting, packed if METHODS[way.method].packing else padded, way) for way in WAYS
    }
    first = {way: first_call_ms(step, device) for way, step in steps.items()}
    times: dict[Way, list[Timed]] = {way: [] for way in WAYS}
    for number in range(sizes.rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:  # no way always comes first
            times[way].append(once(steps[way], device))
    floor = median_of(times[FLOOR]).device_ms
    apart = random_window(Shape(shape.name, shape.lengths, accumulate=True), False, False, device)
    flops = sum(chips.step_flops(sizes.pair, sample) for sample in apart)  # of padding: none
    for way, step in steps.items():
        taken = median_of(times[way])
        setting.forget_gradients()  # else they are there before the step, and missing in its memory
        memory = step_memory(step, setting.edge, device)
        found = kernels(step, device)
        yield {
            "what": f"{shape.name}, {way.name}",
            "ms": taken.device_ms,
            "x floor": taken.device_ms / floor,
            "host ms": taken.host_ms,
            "kernels": found.count,
            "kernels' ms": found.busy_ms,
            "first call ms": first[way],
            "kept MiB": memory.kept / 2**20,
            "peak MiB": memory.peak / 2**20,
            "tokens/s": round(1e3 * sum(shape.lengths) / taken.device_ms),
            "TFLOP/s": flops / taken.device_ms / 1e9,
        }


def _step(setting: Setting, window: list[Batch], way: Way) -> None:
    setting.forget_gradients()
    with attending(way.loop, way.cudnn):
        METHODS[way.method].step(setting, window)
