"""P_attn and P_V, the two maps from the teacher's shapes to the student's (equations 1 and 3)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from alignkd.errors import CheckpointError
from alignkd.losses.alignment import attention_loss_sum
from alignkd.models.attention import BlockLayout, text_vision_block
from alignkd.models.attention_term import attention_term
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.saving import write_tensors
from alignkd.run_folder.atomic_files import flush_to_disk
from alignkd.run_folder.paths import RunPaths


class AttentionAdapter(nn.Linear):
    """P_attn, H_T -> H_S. The attention term runs inside its forward, so that ZeRO-3 gathers its weight once
    in forward and in backward, however many chunks there are."""

    def forward(
        self,
        teacher_block_IHMV: torch.Tensor,
        query_BHLD: torch.Tensor | None = None,
        key_BGLD: torch.Tensor | None = None,
        scaling: float = 1.0,
        layout: BlockLayout | None = None,
        fused: bool = True,
    ) -> torch.Tensor:
        """[..., H_T] -> [..., H_S]; or, with the student's queries and keys, the attention term as a sum.
        Not ``fused``: by autograd through the student's block."""
        if query_BHLD is None or key_BGLD is None or layout is None:
            return super().forward(teacher_block_IHMV)
        if not fused:
            block_IHMV = text_vision_block(query_BHLD, key_BGLD, scaling, layout)
            target_IHMV = teacher_block_IHMV.to(self.weight.dtype)
            return attention_loss_sum(super().forward, target_IHMV, block_IHMV, layout.text_rows_IM)
        return attention_term(
            query_BHLD, key_BGLD, scaling, layout, teacher_block_IHMV, self.weight, self.bias
        )


class AlignmentAdapters(nn.Module):
    """P_attn (heads, H_T -> H_S) and P_V (width, D_T -> D_S): 1x1 convolutions with bias, that is, linear
    maps of the last dimension. Trained together with the student, saved in checkpoints, and at the end in a
    file of their own: they are no part of the exported student."""

    def __init__(self, teacher: MobileVLMConfig, student: MobileVLMConfig) -> None:
        super().__init__()
        self.attention = AttentionAdapter(teacher.num_attention_heads, student.num_attention_heads)
        self.vision = nn.Linear(teacher.hidden_size, student.hidden_size)


def seeded_adapters(teacher: MobileVLMConfig, student: MobileVLMConfig, seed: int) -> AlignmentAdapters:
    """PyTorch's default initialisation from ``seed``, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlignmentAdapters(teacher, student)


def adapters_file(path: Path) -> Path:
    """``path`` itself, or the file in a folder."""
    return RunPaths(path).adapters if path.is_dir() else path


def save_adapters(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The file appears whole or not at all. Raises OSError when the disk does not take it."""
    partial = path.with_name(path.name + ".tmp")
    try:
        write_tensors(tensors, partial)
        flush_to_disk(partial)
        partial.replace(path)
        flush_to_disk(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # half a file only takes room
        raise


def load_adapters(path: Path, teacher: MobileVLMConfig, student: MobileVLMConfig) -> AlignmentAdapters:
    """From a safetensors file with ``attention.weight [H_S, H_T]``, ``attention.bias``, ``vision.weight [D_S,
    D_T]`` and ``vision.bias``, or the folder of a run that ended with one. Raises CheckpointError naming the
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
