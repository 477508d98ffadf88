"""P_attn and P_V, the two maps from the teacher's shapes to the student's (equations 1, 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from alignkd.errors import CheckpointError
from alignkd.models.saving import write_tensors
from alignkd.run_folder.atomic_files import replacing
from alignkd.run_folder.paths import RunPaths

LossOfQueriesAndKeys = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ModelShape(Protocol):
    """What the adapters need to know of a model."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


class AttentionAdapter(nn.Linear):
    """P_attn, a linear map of heads, H_T -> H_S. Its forward lends weight and bias to a function, because
    ZeRO-3 gathers them for the time of the forward only, and the fused loss needs them chunk by chunk."""

    def forward(  # type: ignore[override]  # Linear by its parameters and their initialisation only
        self, query: torch.Tensor, key: torch.Tensor, function: LossOfQueriesAndKeys
    ) -> torch.Tensor:
        """``function(query, key, weight [H_S, H_T], bias [H_S])``. Queries and keys pass through the forward
        so that ZeRO-3 sees where backward is done with the weight."""
        return function(query, key, self.weight, self.bias)


class AlignmentAdapters(nn.Module):
    """P_attn (heads, H_T -> H_S) and P_V (width, D_T -> D_S): 1x1 convolutions with bias, which are linear
    maps. They are trained together with the student and saved in its checkpoints, and at the end in a file of
    their own, because the exported student does not contain them."""

    def __init__(self, teacher: ModelShape, student: ModelShape) -> None:
        super().__init__()
        self.attention = AttentionAdapter(teacher.num_attention_heads, student.num_attention_heads)
        self.vision = nn.Linear(teacher.hidden_size, student.hidden_size)


def seeded_adapters(teacher: ModelShape, student: ModelShape, seed: int) -> AlignmentAdapters:
    """PyTorch's default initialisation from ``seed``, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlignmentAdapters(teacher, student)


def adapters_file(path: Path) -> Path:
    """``path`` itself, or the file in a folder."""
    return RunPaths(path).adapters if path.is_dir() else path


def save_adapters(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Atomic: the file appears complete or not at all. Raises OSError when it cannot be written."""
    with replacing(path) as temporary:
        write_tensors(tensors, temporary)


def load_adapters(path: Path, teacher: ModelShape, student: ModelShape) -> AlignmentAdapters:
    """From a safetensors file with ``attention.weight [H_S, H_T]``, ``attention.bias``, ``vision.weight [D_S,
    D_T]`` and ``vision.bias``, or from the folder of a finished run. Raises CheckpointError naming the
    tensors that do not fit."""
    path = adapters_file(path)
    adapters = AlignmentAdapters(teacher, student)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises several unrelated types
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    expected = {name: tuple(value.shape) for name, value in adapters.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if given != expected:
        raise CheckpointError(f"{path}: holds {given}; these models need {expected}")
    adapters.load_state_dict(tensors)
    return adapters
