"""How many bytes ZeRO gathers: a counter of all-gather outputs where DeepSpeed launches them.

For tests and benchmarks; training does not carry it. Every parameter gather of ZeRO-3, of the teacher and of
the student, goes through DeepSpeed's communication backend; so do the gathers of updated weights at stages 1
and 2. Nothing is added on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.comm import comm


@dataclass
class GatheredBytes:
    """Of this rank: sizes of whole (gathered) tensors, its own shard included."""

    total: int = 0
    calls: int = 0

    def add(self, *outputs: torch.Tensor) -> None:
        self.total += sum(output.numel() * output.element_size() for output in outputs)
        self.calls += 1


@contextmanager
def count_gathered_bytes() -> Iterator[GatheredBytes]:
    """Counts until the ``with`` block ends. Needs DeepSpeed's communication to be initialised."""
    backend: Any = comm.cdb
    assert backend is not None, "ranks have joined their group"
    counter = GatheredBytes()
    into_tensor, into_list = backend.all_gather_into_tensor, backend.all_gather

    def count_tensor(output_tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        counter.add(output_tensor)
        return into_tensor(output_tensor, *arguments, **keywords)

    def count_list(tensor_list: list[torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        counter.add(*tensor_list)
        return into_list(tensor_list, *arguments, **keywords)

    backend.all_gather_into_tensor, backend.all_gather = count_tensor, count_list
    try:
        yield counter
    finally:
        del backend.all_gather_into_tensor, backend.all_gather  # the class's own show again
