"""LDPv2, the projector of MobileVLM V2 (arXiv 2402.03766): many patch features to few vision tokens.

Shapes: I images, P patches, C width of the vision tower, D width of the language model, S side of the grid.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _FeatureTransform(nn.Module):
    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(features)
        return output


class _PositionalEncoding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.peg(grid) + grid
        return output


def _pool(grid_IDSS: torch.Tensor, side: int) -> torch.Tensor:
    """[I, D, S, S] -> [I, D, side, side], averages."""
    size = grid_IDSS.shape[-1]
    # On a GPU the general form has no deterministic backward; windows of equal size do not need it.
    if torch.are_deterministic_algorithms_enabled() and size % side == 0:
        return F.avg_pool2d(grid_IDSS, size // side)
    return F.adaptive_avg_pool2d(grid_IDSS, side)


class LDPv2Projector(nn.Module):
    """[I, P, C] patch features -> [I, tokens_per_side ** 2, D]; P is a square number.

    Its nested sub-modules give the published tensor names (``mlp.mlp.0.weight``, ``peg.peg.0.weight``).
    """

    def __init__(self, vision_width: int, width: int, tokens_per_side: int) -> None:
        super().__init__()
        self.tokens_per_side = tokens_per_side
        self.mlp = _FeatureTransform(vision_width, width)
        self.peg = _PositionalEncoding(width)

    def forward(self, features_IPC: torch.Tensor) -> torch.Tensor:
        hidden_IPD = self.mlp(features_IPC)
        side = int(hidden_IPD.shape[1] ** 0.5)
        grid_IDSS = hidden_IPD.transpose(1, 2).unflatten(2, (side, side))
        pooled = _pool(grid_IDSS, self.tokens_per_side)
        output: torch.Tensor = self.peg(pooled)
        return output.flatten(2).transpose(1, 2)
