"""Time spent in a part of a step, measured without making the host wait for the device."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator


class Stopwatch:
    """Adds up the time inside ``with`` blocks, by device events, or by the host's clock on a CPU."""

    def __init__(self) -> None:
        self._on_cpu = get_accelerator().device_name() == "cpu"
        self._host_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._start: Any = None

    def __enter__(self) -> None:
        self._start = time.perf_counter() if self._on_cpu else self._record()

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._on_cpu:
            self._host_seconds += time.perf_counter() - self._start
        else:
            self._events.append((self._start, self._record()))

    def take(self) -> Reading:
        """What was measured since the last call, to be read out later."""
        reading = Reading(self._host_seconds, self._events)
        self._host_seconds, self._events = 0.0, []
        return reading

    def _record(self) -> Any:
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event


class Reading:
    """One take of a stopwatch. :meth:`seconds` waits for the device's events, so call it a step later."""

    def __init__(self, host_seconds: float, events: list[tuple[Any, Any]]) -> None:
        self._host_seconds = host_seconds
        self._events = events

    def seconds(self) -> float:
        for _, end in self._events:
            end.synchronize()
        return self._host_seconds + sum(float(start.elapsed_time(end)) for start, end in self._events) / 1000


class StudentWatches(NamedTuple):
    """The parts of a step that follow the teacher's."""

    student: Stopwatch  # forward and backward, and what ranks exchange meanwhile
    optimizer: Stopwatch  # DeepSpeed's step: norm, clipping, update, new weights

    def take(self) -> dict[str, Reading]:
        return {name: watch.take() for name, watch in self._asdict().items()}


def student_watches() -> StudentWatches:
    return StudentWatches(Stopwatch(), Stopwatch())


def timed_forwards(module: torch.nn.Module) -> Stopwatch:
    """A stopwatch that runs during every forward of ``module``."""
    watch = Stopwatch()
    module.register_forward_pre_hook(lambda *_: watch.__enter__())
    module.register_forward_hook(lambda *_: watch.__exit__(None, None, None))
    return watch
