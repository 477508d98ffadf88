"""Times of one call on a device: until the device is done, until the host is, and what the kernels take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Medians in milliseconds. Where both are close, the device waits for the host."""

    device_ms: float  # from the first kernel to the end of the last
    host_ms: float  # until the host has queued all of them


def timed(call: Call, device: torch.device, rounds: int, warm_up: int = 2) -> Timed:
    for _ in range(warm_up):
        call()
    return median_of([once(call, device) for _ in range(rounds)])


def once(call: Call, device: torch.device) -> Timed:
    """One call, from an idle device on. On a CPU both times are the same."""
    wait(device)
    start = time.perf_counter()
    if device.type != "cuda":
        call()
        taken = 1e3 * (time.perf_counter() - start)
        return Timed(taken, taken)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    call()
    last.record()
    queued = time.perf_counter()
    wait(device)
    return Timed(first.elapsed_time(last), 1e3 * (queued - start))


def median_of(times: list[Timed]) -> Timed:
    return Timed(
        statistics.median(taken.device_ms for taken in times),
        statistics.median(taken.host_ms for taken in times),
    )


def first_call_ms(call: Call, device: torch.device) -> float:
    """By the host's clock: what a first call takes is mostly the host's work."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Kernels:
    """Of one call. On a CPU torch's operators stand for kernels."""

    count: int
    busy_ms: float  # sum of their times; copies and fills included
    names: tuple[str, ...]  # the longest-running first


def kernels(call: Call, device: torch.device) -> Kernels:
    on_gpu = device.type == "cuda"
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        wait(device)
    events = [
        (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]
    events.sort(key=lambda event: -event[2])
    return Kernels(
        sum(count for _, count, _ in events),
        sum(microseconds for *_, microseconds in events) / 1e3,
        tuple(name for name, *_ in events),
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
