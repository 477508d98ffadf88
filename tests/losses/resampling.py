"""Resampling in plain loops over cells, without our code."""

from __future__ import annotations

import math

import torch


def attention(map_V: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """[..., U]: every cell is cut into equal crumbs, as many as make whole cells of both grids; a new cell
    gets the crumbs that lie in it."""
    plane = map_V.unflatten(-1, grid)
    for dim, old, new in ((-2, grid[0], wanted[0]), (-1, grid[1], wanted[1])):
        crumbs = math.lcm(old, new)
        plane = plane.repeat_interleave(crumbs // old, dim) / (crumbs // old)
        plane = plane.unflatten(dim, (new, crumbs // new)).sum(dim if dim == -1 else -2)
    return plane.flatten(-2)


def tokens(tokens_VD: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """[U, D]: each new token is the mean of the old ones, weighted by a triangle around its centre."""
    plane = tokens_VD.unflatten(0, grid)
    rows = [
        torch.stack(
            [
                sum(
                    down * across * plane[y, x]
                    for y, down in enumerate(_triangle(row, grid[0], wanted[0]))
                    for x, across in enumerate(_triangle(column, grid[1], wanted[1]))
                )
                for column in range(wanted[1])
            ]
        )
        for row in range(wanted[0])
    ]
    return torch.cat(rows)


def _triangle(cell: int, old: int, new: int) -> list[float]:
    centre, reach = (cell + 0.5) * old / new, max(old / new, 1.0)
    weights = [max(0.0, 1 - abs(one + 0.5 - centre) / reach) for one in range(old)]
    return [weight / sum(weights) for weight in weights]
