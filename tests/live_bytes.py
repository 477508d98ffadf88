"""Bytes of tensors in this process, counted by storage: the resident memory of a process is too noisy."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def held_storages() -> dict[int, int]:
    """Bytes of every storage that some Python object or a gradient holds, by its address."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if isinstance(value, torch.Tensor):
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return found


class LiveBytes(TorchDispatchMode):
    """``live``: bytes of the storages that operations made under this mode and that are still alive;
    ``peak``: the most of them at a time. What a kernel takes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
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
        if key in self._known or key in given:  # a view, or something older than this mode
            return

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
