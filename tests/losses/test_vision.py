"""Equations 2 to 4: hand-computed values, images without text, any pair of widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alignkd.losses.grids import resample_attention
from alignkd.losses.vision import focus_indices, vision_loss_sums
from tests.losses.blocks import NO_ROW, linear, random_linear


def losses_of(
    adapter: nn.Linear,
    teacher: torch.Tensor,
    student: torch.Tensor,
    chosen: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return vision_loss_sums(adapter(teacher), student, chosen, rows)


def test_hand_computed_vision_losses() -> None:
    """One image of three vision tokens; the focus is on tokens 0 and 2."""
    adapter = linear([[1.0, 1.0], [0.0, 2.0]], [0.0, 1.0])
    teacher = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]])  # adapted: (3, 5), (0, 1), (2, -1)
    student = torch.tensor([[[3.0, 4.0], [2.0, 1.0], [0.0, 0.0]]])  # squares: 1, 4, 5
    everything, focus = losses_of(adapter, teacher, student, torch.tensor([[0, 2]]), torch.tensor([[5]]))
    assert everything.item() == pytest.approx(10.0)
    assert focus.item() == pytest.approx(6.0)


def test_an_image_without_rows_has_no_focus() -> None:
    adapter, teacher, student = random_linear(4, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    chosen = torch.tensor([[0, 1], [2, 3]])
    rows = torch.tensor([[NO_ROW, NO_ROW], [8, NO_ROW]])
    squares = (adapter(teacher) - student).square().sum(-1)
    everything, focus = losses_of(adapter, teacher, student, chosen, rows)
    assert torch.allclose(everything, squares.sum())
    assert torch.allclose(focus, squares[1, 2:4].sum())


def test_the_row_in_column_zero_is_a_row() -> None:
    student = torch.ones(1, 2, 3)
    _, focus = vision_loss_sums(torch.zeros(1, 2, 3), student, torch.tensor([[1]]), torch.tensor([[0]]))
    assert focus == 3


def test_focus_on_all_tokens_equals_all() -> None:
    adapter, teacher, student = random_linear(4, 3), torch.randn(2, 6, 4), torch.randn(2, 6, 3)
    chosen = focus_indices(torch.rand(2, 8, 3, 6), top_k=6)
    everything, focus = losses_of(adapter, teacher, student, chosen, torch.tensor([[5], [5]]))
    assert torch.allclose(everything, focus)
    assert everything > 0


def test_hand_computed_focus_indices() -> None:
    """Averaged over heads, summed over rows: the third token wins though no single entry is the largest."""
    block = torch.tensor(
        [
            [
                [[0.9, 0.0, 0.4, 0.1], [0.0, 0.0, 0.4, 0.1]],
                [[0.0, 0.1, 0.4, 0.1], [0.0, 0.1, 0.4, 0.2]],
            ]
        ]
    )  # sums over heads and rows: 0.9, 0.2, 1.6, 0.5
    assert focus_indices(block, 1).tolist() == [[2]]
    assert focus_indices(block, 3).tolist() == [[2, 0, 3]]


def test_of_equal_scores_the_first_tokens_are_the_focus() -> None:
    """As a map of 3 x 3 has them on a grid of 24 x 24: 64 cells of each score."""
    coarse = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0]).view(1, 1, 1, 9)
    block = resample_attention(coarse, (3, 3), (24, 24))
    scores = block.flatten().tolist()
    expected = sorted(range(24 * 24), key=lambda token: -scores[token])  # sorted is stable
    assert len(set(scores)) == 3
    assert focus_indices(block, 100).tolist() == [expected[:100]]
    assert focus_indices(block, 1000).tolist() == [expected]


def test_focus_is_per_image() -> None:
    block = torch.zeros(2, 2, 1, 4)
    block[0, :, :, 1] = 1.0
    block[1, :, :, 3] = 1.0
    assert focus_indices(block, 1).tolist() == [[1], [3]]


@pytest.mark.parametrize("images", [0, 2])
def test_no_rows_give_a_zero_focus_with_a_graph(images: int) -> None:
    adapter = random_linear(4, 5)
    student = torch.zeros(images, 6, 5, requires_grad=True)
    text_rows = torch.zeros(images, 0, dtype=torch.int64)
    chosen = focus_indices(torch.zeros(images, 3, 0, 6), 2)
    assert chosen.shape == (images, 2)
    everything, focus = losses_of(adapter, torch.zeros(images, 6, 4), student, chosen, text_rows)
    assert focus.item() == 0.0
    (everything + focus).backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert images == 0 or everything.item() > 0, "an image without text still takes part in L_V-all"


@pytest.mark.parametrize(("teacher_width", "width"), [(32, 16), (3, 8), (1, 5), (7, 1)])
def test_any_pair_of_widths(teacher_width: int, width: int) -> None:
    adapter = random_linear(teacher_width, width)
    teacher, student = torch.rand(1, 6, teacher_width), torch.rand(1, 6, width)
    for loss in losses_of(adapter, teacher, student, torch.tensor([[0, 1]]), torch.tensor([[3, 4]])):
        assert loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, adapter.weight, retain_graph=True)
        assert gradient.any()


def test_half_precision_is_summed_in_single() -> None:
    adapter = random_linear(8, 4, torch.bfloat16)
    teacher, student = torch.rand(2, 1000, 8).bfloat16(), torch.rand(2, 1000, 4).bfloat16()
    rows, chosen = torch.tensor([[1], [1]]), torch.arange(1000).expand(2, -1)
    sums = losses_of(adapter, teacher, student, chosen, rows)
    difference = adapter(teacher) - student
    for value in sums:
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(difference.double().square().sum().item(), rel=1e-5)
