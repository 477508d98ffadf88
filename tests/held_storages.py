"""Bytes of tensors in this process, counted by storage: the resident memory of a process is too noisy."""

from __future__ import annotations

import gc

import torch


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
