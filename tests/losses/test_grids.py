"""Made-up maps and tokens with known answers, onto finer, coarser and other grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkd.losses import resample_attention, resample_tokens
from alignkd.losses.grids import resample_images
from tests.losses import resampling

Grid = tuple[int, int]
GRIDS: list[tuple[Grid, Grid]] = [
    ((2, 2), (4, 4)),
    ((4, 4), (2, 2)),
    ((3, 3), (2, 2)),
    ((2, 3), (5, 2)),
    ((9, 12), (6, 8)),
    ((12, 12), (1, 1)),
]


def tokens_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(("grid", "wanted"), GRIDS)
def test_every_row_of_attention_keeps_its_mass(grid: Grid, wanted: Grid) -> None:
    maps = torch.rand(3, 5, grid[0] * grid[1])
    made = resample_attention(maps, grid, wanted)
    assert made.shape == (3, 5, wanted[0] * wanted[1])
    assert torch.allclose(made.sum(-1), maps.sum(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("grid", "wanted"), GRIDS)
def test_both_equal_plain_loops_over_cells(grid: Grid, wanted: Grid) -> None:
    values = torch.randn(grid[0] * grid[1], 3, dtype=torch.float64)
    made, expected = (one(values, grid, wanted) for one in (resample_tokens, resampling.tokens))
    assert torch.allclose(made, expected, atol=1e-12)
    made, expected = (one(values.T, grid, wanted) for one in (resample_attention, resampling.attention))
    assert torch.allclose(made, expected, atol=1e-12)


@pytest.mark.parametrize(("grid", "wanted"), GRIDS)
def test_what_is_the_same_everywhere_stays_so(grid: Grid, wanted: Grid) -> None:
    old, new = grid[0] * grid[1], wanted[0] * wanted[1]
    assert torch.allclose(resample_tokens(torch.full((old, 2), 3.0), grid, wanted), torch.tensor(3.0))
    made = resample_attention(torch.full((old,), 1 / old), grid, wanted)
    assert torch.allclose(made, torch.full((new,), 1 / new))


def test_a_single_token_of_attention_goes_where_it_lies() -> None:
    delta = torch.zeros(4)
    delta[1] = 1.0  # the upper right one
    made = resample_attention(delta, (2, 2), (4, 4)).view(4, 4)
    assert made[:2, 2:].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert made.sum() == 1
    delta = torch.zeros(16)
    delta[4 * 3 + 1] = 1.0  # in the lower left quarter
    assert resample_attention(delta, (4, 4), (2, 2)).tolist() == [0, 0, 1, 0]
    # Half of the middle row of three, and of its middle column, lies in each of two.
    delta = torch.zeros(9)
    delta[4] = 1.0
    assert resample_attention(delta, (3, 3), (2, 2)).tolist() == [0.25] * 4


def test_a_ramp_of_attention_is_summed_over_cells() -> None:
    ramp = torch.arange(6.0)
    assert resample_attention(ramp, (1, 6), (1, 3)).tolist() == [1, 5, 9]
    assert resample_attention(ramp, (6, 1), (2, 1)).tolist() == [3, 12]
    assert torch.allclose(
        resample_attention(torch.tensor([1.0, 2.0, 3.0]), (1, 3), (1, 2)), torch.tensor([2.0, 4.0])
    )


def test_a_single_token_reaches_its_neighbours_on_a_finer_grid() -> None:
    made = resample_tokens(tokens_of(0, 1, 0), (1, 3), (1, 6))
    assert torch.allclose(made, tokens_of(0, 0.25, 0.75, 0.75, 0.25, 0))
    made = resample_tokens(tokens_of(0, 1, 0, 0), (1, 4), (1, 2))  # 0.75 of 0.25 + 0.75 + 0.75
    assert torch.allclose(made, tokens_of(3 / 7, 1 / 7))


def test_a_ramp_of_tokens_stays_one_between_the_borders() -> None:
    ramp = tokens_of(*range(4))
    made = resample_tokens(ramp, (4, 1), (8, 1))
    assert torch.allclose(made, tokens_of(0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3))
    made = resample_tokens(tokens_of(*range(8)), (1, 8), (1, 4))
    assert torch.allclose(made[1:3], tokens_of(2.5, 4.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_grids_change_nothing(dtype: torch.dtype) -> None:
    tokens = torch.randn(6, 3).to(dtype)
    assert resample_tokens(tokens, (2, 3), (2, 3)).equal(tokens)
    maps = torch.rand(2, 6)
    assert resample_attention(maps, (2, 3), (2, 3)).equal(maps)


def test_half_precision_tokens_are_averaged_in_single() -> None:
    tokens = torch.randn(144, 8).bfloat16()
    made = resample_tokens(tokens, (12, 12), (5, 5))
    assert made.dtype == torch.bfloat16
    assert made.equal(resample_tokens(tokens.float(), (12, 12), (5, 5)).bfloat16())


def test_the_host_does_not_wait_for_the_device() -> None:
    with torch.device("meta"):
        made = resample_attention(torch.rand(2, 9), (3, 3), (2, 2))
        assert made.device.type == resample_tokens(torch.rand(9, 4), (3, 3), (2, 2)).device.type == "meta"


SAME = [((3, 4), (2, 2))]
MIXED = [*SAME, ((4, 3), (2, 2)), ((4, 3), (1, 4))]


def of_images(values: torch.Tensor, pairs: list[tuple[Grid, Grid]]) -> torch.Tensor:
    return resample_images(values, pairs, resample_tokens)


@pytest.mark.parametrize("pairs", [SAME, MIXED, [*SAME, *MIXED, *SAME]], ids=["equal", "mixed", "repeated"])
def test_images_are_resampled_as_each_alone(pairs: list[tuple[Grid, Grid]]) -> None:
    pairs = [*pairs, *pairs]
    values = torch.randn(len(pairs), 12, 5, dtype=torch.float64)
    alone = [resample_tokens(image, *pair) for image, pair in zip(values, pairs, strict=True)]
    assert torch.allclose(of_images(values, pairs), torch.stack(alone), atol=1e-12)


class Kernels(TorchDispatchMode):
    """Counts operations that are more than views."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func._schema.returns[0].alias_info
        self.count += result is None or result.is_write
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pairs", [SAME, MIXED], ids=["equal", "mixed"])
def test_more_images_with_the_same_grids_need_no_more_kernels(pairs: list[tuple[Grid, Grid]]) -> None:
    """On the meta device, where a copy of the images' numbers from the host would be one more."""
    counts = []
    for times in (2, 9):
        with torch.device("meta"):
            values = torch.rand(times * len(pairs), 12, 5)
        with Kernels() as kernels:
            made = of_images(values, pairs * times)
        assert made.device.type == "meta"
        assert made.shape == (times * len(pairs), 4, 5)
        counts.append(kernels.count)
    assert counts[0] == counts[1] > 0
