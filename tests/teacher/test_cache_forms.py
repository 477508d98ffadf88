"""Hidden states in 8 bits: how far each number may be off, and rows that are no ordinary ones."""

from __future__ import annotations

import pytest
import torch

from alignkd.teacher.cache_forms import FORMS, FP8, from_fp8, to_fp8
from alignkd.teacher.cache_top_k import TeacherHead

TYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 64


def rows_of_many_sizes(dtype: torch.dtype) -> torch.Tensor:
    """[400, WIDTH]: rows whose largest numbers are 1e-3 to 1e3, each with small numbers, too."""
    generator = torch.Generator().manual_seed(0)
    sizes_N1 = torch.logspace(-3, 3, 400)[:, None]
    drawn_ND = torch.randn(400, WIDTH, generator=generator)
    return (sizes_N1 * drawn_ND * drawn_ND.abs() ** 3).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_comes_back_within_a_sixteenth_of_itself_or_a_little_of_its_rows_largest(
    dtype: torch.dtype,
) -> None:
    hidden_ND = rows_of_many_sizes(dtype)
    stored = to_fp8(hidden_ND)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"hidden": FP8, "scales": torch.float32}
    assert [tensor.shape for tensor in stored.values()] == [hidden_ND.shape, hidden_ND.shape[:1]]
    found_ND = from_fp8(stored, dtype)
    assert found_ND.dtype == dtype
    rounding_ND = torch.finfo(dtype).eps * found_ND.double().abs()  # to the teacher's precision
    whole_ND = hidden_ND.double()
    largest_N1 = whole_ND.abs().amax(dim=1, keepdim=True)
    error_ND = (found_ND.double() - whole_ND).abs()
    fine_ND = torch.maximum(whole_ND.abs() / 16, largest_N1 / (448 * 1024))
    tiny = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    assert (error_ND <= fine_ND + rounding_ND + tiny).all()
    assert (error_ND <= largest_N1 / 28 + rounding_ND).all()
    assert error_ND.max() > 0
    is_largest_ND = whole_ND.abs() == largest_N1
    assert (
        found_ND[is_largest_ND]
        .double()
        .sub(whole_ND[is_largest_ND])
        .abs()
        .le(rounding_ND[is_largest_ND])
        .all()
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    hidden_ND = rows_of_many_sizes(dtype)
    alone = [to_fp8(hidden_ND[row : row + 1]) for row in range(len(hidden_ND))]
    for name, tensor in to_fp8(hidden_ND).items():
        assert torch.cat([stored[name] for stored in alone]).view(torch.uint8).equal(tensor.view(torch.uint8))


def test_rows_of_zeros_and_of_very_small_and_large_numbers_come_back_finite() -> None:
    hidden_ND = torch.tensor([[0.0, -0.0], [1e-45, 1e-40], [1e-34, -1e-35], [3.4e38, -1e30]])
    stored = to_fp8(hidden_ND)
    assert stored["scales"][:2].tolist() == [1.0, 1.0]
    found_ND = from_fp8(stored, torch.float32)
    assert found_ND[:2].eq(0).all()
    assert found_ND.isfinite().all()
    assert found_ND[2:].sub(hidden_ND[2:]).abs().le(hidden_ND[2:].abs().amax(dim=1, keepdim=True) / 28).all()


def test_a_row_with_a_number_that_is_not_finite_comes_back_as_nan_and_other_rows_do_not() -> None:
    hidden_ND = torch.tensor([[1.0, torch.inf], [1.0, torch.nan], [1.0, -torch.inf], [1.0, 2.0]])
    found_ND = from_fp8(to_fp8(hidden_ND), torch.float32)
    assert found_ND[:3].isnan().all()
    assert found_ND[3].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_what_a_form_writes_of_no_position_is_like_its_empty_tensors(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    head = TeacherHead(torch.zeros(100, WIDTH, dtype=dtype), top_k=WIDTH, temperature=1.0)
    written, empty = form.encode(torch.empty(0, WIDTH, dtype=dtype), head), form.empty(WIDTH, dtype)
    assert list(written) == list(empty)
    for tensor, expected in zip(written.values(), empty.values(), strict=True):
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
