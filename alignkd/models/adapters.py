"""P_attn and P_V, the two maps from the teacher's shapes to the student's (equations 1 and 3)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from alignkd.errors import CheckpointError
from alignkd.models.attention import BlockLayout, at_least_fp32, block_chunks, chunk_block, recomputed
from alignkd.models.configuration import MobileVLMConfig


class AttentionAdapter(nn.Linear):
    """P_attn, H_T -> H_S. The attention term runs inside its forward, so that ZeRO-3 gathers its weight once,
    however many chunks there are."""

    def forward(
        self,
        teacher_block_IHMV: torch.Tensor,
        query_BHLD: torch.Tensor | None = None,
        key_BGLD: torch.Tensor | None = None,
        scaling: float = 1.0,
        layout: BlockLayout | None = None,
    ) -> torch.Tensor:
        """[..., H_T] -> [..., H_S]; or, with the student's queries and keys, the sum of equation 1 over all
        valid rows, in fp32 (or wider), with a graph.

        Neither the student's block nor the adapted one nor their difference outlives a chunk of rows.
        """
        if query_BHLD is None or key_BGLD is None or layout is None:
            return super().forward(teacher_block_IHMV)
        # All take part even when there is no row: ZeRO-3 lets go of the weight when every input that wants a
        # gradient has got one, and all ranks' gathers must agree.
        everything = (query_BHLD, key_BGLD, self.weight, self.bias)
        nothing = torch.stack([tensor[:0].sum() for tensor in everything]).sum()
        parts = [nothing.to(at_least_fp32(query_BHLD.dtype))]
        for chunk in block_chunks(query_BHLD, key_BGLD, layout):
            target_HCV = teacher_block_IHMV[chunk.image, :, chunk.rows]
            arguments = (*chunk.arguments, scaling, target_HCV, self.weight, self.bias)
            parts.append(recomputed(_chunk_squares, *arguments))
        return torch.stack(parts).sum()


def _chunk_squares(
    query_HlD: torch.Tensor,
    key_GlD: torch.Tensor,
    rows_C: torch.Tensor,
    start: int,
    stop: int,
    scaling: float,
    target_HCV: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    student_HCV = chunk_block(query_HlD, key_GlD, rows_C, start, stop, scaling)
    adapted = torch.addmm(bias[:, None], weight, target_HCV.flatten(1).to(weight.dtype))
    return (student_HCV.flatten(1) - adapted).square().sum()


class AlignmentAdapters(nn.Module):
    """P_attn (heads, H_T -> H_S) and P_V (width, D_T -> D_S): 1x1 convolutions with bias, that is, linear
    maps of the last dimension. Trained together with the student, saved in checkpoints, never exported."""

    def __init__(self, teacher: MobileVLMConfig, student: MobileVLMConfig) -> None:
        super().__init__()
        self.attention = AttentionAdapter(teacher.num_attention_heads, student.num_attention_heads)
        self.vision = nn.Linear(teacher.hidden_size, student.hidden_size)


def seeded_adapters(teacher: MobileVLMConfig, student: MobileVLMConfig, seed: int) -> AlignmentAdapters:
    """PyTorch's default initialisation from ``seed``, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlignmentAdapters(teacher, student)


def load_adapters(path: Path, teacher: MobileVLMConfig, student: MobileVLMConfig) -> AlignmentAdapters:
    """From a safetensors file with ``attention.weight [H_S, H_T]``, ``attention.bias``, ``vision.weight [D_S,
    D_T]`` and ``vision.bias``. Raises CheckpointError naming the tensors that do not fit."""
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
