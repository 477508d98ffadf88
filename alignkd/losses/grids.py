"""The teacher's vision tokens, and its attention to them, on the student's grid.

For two models that see the same part of an image on rectangular grids of different sizes. A grid is (rows,
columns); tokens are in row-major order. Shapes: V vision tokens of the teacher, U of the student, D width of
the teacher, and any leading dimensions. The host never waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from alignkd.losses.precision import at_least_fp32

Grid = tuple[int, int]


def resample_tokens(tokens_VD: torch.Tensor, grid: Grid, wanted: Grid) -> torch.Tensor:
    """[..., U, D]: bilinear interpolation between the centres of cells. Onto a coarser grid, all tokens that
    a cell covers have a part in it (antialiasing)."""
    wide_VD = tokens_VD.to(at_least_fp32(tokens_VD.dtype))
    down, across = (_triangles(old, new, wide_VD) for old, new in zip(grid, wanted, strict=True))
    rows = (across @ torch.unflatten(wide_VD, -2, grid)).flatten(-2)
    made = torch.unflatten(down @ rows, -1, (wanted[1], -1)).flatten(-3, -2)
    return made.to(tokens_VD.dtype)


def resample_attention(attention_V: torch.Tensor, grid: Grid, wanted: Grid) -> torch.Tensor:
    """[..., U]: attention is a density over the image, constant within a cell; that of a student's token is
    the integral over its cell. So every row keeps its mass, and a uniform one stays uniform."""
    down, across = (_shares(old, new, attention_V) for old, new in zip(grid, wanted, strict=True))
    made: torch.Tensor = down @ (torch.unflatten(attention_V, -1, grid) @ across.T)
    return made.flatten(-2)


def resample_images(
    values: torch.Tensor,
    pairs: Sequence[tuple[Grid, Grid]],
    resample: Callable[[torch.Tensor, Grid, Grid], torch.Tensor],
) -> torch.Tensor:
    """[I, ...]: the values [I, ...] of each image, resampled from its grid to the wanted one. ``pairs`` has
    these two of every image, of at least one; ``resample`` returns the same shape for all of them.

    Images with equal grids are resampled together, so that only different ones add kernels. No index says
    which they are: it would have to be copied to the device.
    """
    images_of: defaultdict[tuple[Grid, Grid], list[int]] = defaultdict(list)
    for image, pair in enumerate(pairs):
        images_of[pair].append(image)
    if len(images_of) == 1:
        return resample(values, *pairs[0])
    made: dict[int, torch.Tensor] = {}
    for pair, images in images_of.items():
        together = torch.stack([values[image] for image in images])
        made |= zip(images, resample(together, *pair), strict=True)
    return torch.stack([made[image] for image in range(len(pairs))])


def _triangles(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """[new, old]: weights of ``old`` equal intervals by the distance of their centres from those of
    ``new``."""
    olds, news = (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5 for count in (old, new))
    distances = (olds - news[:, None] * old / new).abs()
    weights = (1 - distances / max(old / new, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def _shares(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """[new, old]: the share of each of ``old`` equal intervals that lies in each of ``new``."""
    # In units of 1 / (old * new), so that all edges are whole numbers.
    olds, news = (torch.arange(count, device=like.device) * step for count, step in ((old, new), (new, old)))
    overlaps = torch.minimum(olds + new, news[:, None] + old) - torch.maximum(olds, news[:, None])
    return overlaps.clamp(min=0).to(like.dtype) / new
