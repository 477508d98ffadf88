"""How many bytes ZeRO gathers, counted at the all-gathers of DeepSpeed's communication backend.

For tests and benchmarks; training does not use it. All parameter gathers of ZeRO-3, of teacher and student,
go through that backend, and so do the gathers of updated weights at stages 1 and 2. Nothing runs on the
device.
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
    """Of this rank: sizes of the gathered tensors, its own shards included."""

    total: int = 0

    def add(self, *outputs: torch.Tensor) -> None:
        self.total += sum(output.numel() * output.element_size() for output in outputs)


@contextmanager
def count_gathered_bytes() -> Iterator[GatheredBytes]:
    """Counts until the ``with`` block ends. DeepSpeed's communication must have been initialised."""
    backend: Any = comm.cdb
    assert backend is not None, "call deepspeed.init_distributed first"
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
        del backend.all_gather_into_tensor, backend.all_gather  # uncovers the class's own methods
