"""The forms in which a cache stores the teacher's answers (``teacher.cache_form``): which tensors a shard
has, what is written into them, and what a batch gets from them.

Shapes: n positions of one sample, N of a batch, D the teacher's width, K the number of
tokens that ``top_k`` stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from alignkd.data.batch import Batch
from alignkd.teacher.cache_top_k import TeacherHead, empty_top_k, fill_top_k, to_top_k

Tensors = dict[str, torch.Tensor]  # by name, with a row for each position
FP8 = torch.float8_e4m3fn  # 4 bits of exponent and 3 of mantissa
FP8_LARGEST = torch.finfo(FP8).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it fp32 loses precision


@dataclass(frozen=True)
class Form:
    """Plain functions of a module: a reader is sent to the loader's workers."""

    # All tensors without a row, given the identity's width (D, or K for ``top_k``) and the teacher's dtype.
    empty: Callable[[int, torch.dtype], Tensors]
    # From the hidden states [n, D] of a sample, on their device, and the head for the forms that apply it.
    encode: Callable[[torch.Tensor, TeacherHead], Tensors]
    fill: Callable[[Batch, Tensors, torch.dtype], Batch]  # the batch with what was stored for its N positions


def to_fp8(hidden_ND: torch.Tensor) -> Tensors:
    """``hidden`` [N, D] in float8_e4m3fn and ``scales`` [N] in fp32, of hidden states in any precision.

    Each row is divided by a scale that moves its largest magnitude m to the largest number of fp8. A number x
    of it comes back within max(|x| / 16, m / 458,752), hence within m / 28, before it is rounded to the
    teacher's precision. A row of zeros has the scale 1, and so has one below 5e-36, which becomes zeros. A
    row with a number that is not finite comes back as NaN: its logits, and the loss, are not finite either
    way.
    """
    rows_ND = hidden_ND.float()
    scales_N = rows_ND.abs().amax(dim=1) / FP8_LARGEST
    scales_N = torch.where(scales_N < SMALLEST_SCALE, 1.0, scales_N)
    return {"hidden": (rows_ND / scales_N[:, None]).to(FP8), "scales": scales_N}


def from_fp8(stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states [N, D] in ``dtype``."""
    return (stored["hidden"].float() * stored["scales"][:, None]).to(dtype)


def _empty_exact(width: int, dtype: torch.dtype) -> Tensors:
    return {"hidden": torch.empty(0, width, dtype=dtype)}


def _encode_exact(hidden_nD: torch.Tensor, _head: TeacherHead) -> Tensors:
    return {"hidden": hidden_nD}


def _fill_exact(batch: Batch, stored: Tensors, _dtype: torch.dtype) -> Batch:
    return replace(batch, teacher_hidden_ND=stored["hidden"])


def _empty_fp8(width: int, dtype: torch.dtype) -> Tensors:
    return to_fp8(torch.empty(0, width, dtype=dtype))


def _encode_fp8(hidden_nD: torch.Tensor, _head: TeacherHead) -> Tensors:
    return to_fp8(hidden_nD)


def _fill_fp8(batch: Batch, stored: Tensors, dtype: torch.dtype) -> Batch:
    return replace(batch, teacher_hidden_ND=from_fp8(stored, dtype))


def _empty_top_k(top_k: int, _dtype: torch.dtype) -> Tensors:
    return empty_top_k(top_k)


def _fill_top_k(batch: Batch, stored: Tensors, _dtype: torch.dtype) -> Batch:
    return fill_top_k(batch, stored)


FORMS = {
    "exact": Form(_empty_exact, _encode_exact, _fill_exact),
    "fp8": Form(_empty_fp8, _encode_fp8, _fill_fp8),
    "top_k": Form(_empty_top_k, to_top_k, _fill_top_k),
}
