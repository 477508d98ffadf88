"""Time and memory of one call. On a CPU a process's resident size is too noisy, so tensors are counted."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``live``: bytes of the storages that were created under this mode and are still alive; ``peak``: their
    maximum. Memory that a kernel allocates internally is not seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: set[int] = set()
        tree_map_only(torch.Tensor, lambda tensor: given.add(tensor.untyped_storage()._cdata), (args, kwargs))
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._see(tensor, given), made)
        return made

    def _see(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:  # a view, or older than this mode
            return
        if storage.device.type == "meta":  # a size without memory
            return

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Memory:
    """Bytes of one step, on top of the weights, which exist before it."""

    kept: int  # alive between forward and backward
    peak: int


class Edge:
    """The moment between forward and backward, when only what is kept for backward is alive."""

    def __init__(self) -> None:
        self.on_reached: Callable[[], None] = lambda: None


def step_memory(step: Callable[[], object], edge: Edge, device: torch.device) -> Memory:
    """Memory of one call of ``step``, which must reach ``edge``; the largest ``kept`` of several counts."""
    kept = 0
    if device.type == "cpu":
        counter = LiveBytes()

        def reached() -> None:
            nonlocal kept
            kept = max(kept, counter.live)

        edge.on_reached = reached
        with counter:
            step()
        edge.on_reached = lambda: None
        return Memory(kept, counter.peak)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def reached_on_device() -> None:
        nonlocal kept
        kept = max(kept, torch.cuda.memory_allocated() - before)

    edge.on_reached = reached_on_device
    step()
    torch.cuda.synchronize()
    edge.on_reached = lambda: None
    return Memory(kept, torch.cuda.max_memory_allocated() - before)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
