"""The same results in every run, to the last bit: what torch must be told on a GPU."""

from __future__ import annotations

import os

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
TWO_SIZES = ":4096:8"  # KiB: with it cuBLAS adds up in one order, whatever streams it runs on


def fix_workspace() -> None:
    """Before anything starts CUDA, and so before torch is imported; a value from outside stays."""
    os.environ.setdefault(WORKSPACE, TWO_SIZES)


def use_deterministic_kernels() -> None:
    """For the rest of the process; an operation without such a kernel raises RuntimeError, with its name.

    Flash attention's backward adds up in a fixed order from here on. The memory-efficient kernel is turned
    off; attention in fp32, which flash attention does not do, falls back to plain matrix products.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cudnn.benchmark = False
    # Else every new tensor is filled, to expose reads of what nobody has written: two more passes over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
