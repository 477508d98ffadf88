"""The precision that losses are summed in."""

from __future__ import annotations

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, ``dtype`` itself where it is wider (fp64 in tests and the probe)."""
    return torch.promote_types(dtype, torch.float32)
