"""Attention and vision losses: hand-computed values, masks, any pair of shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alignkd.data.batch import NO_ROW
from alignkd.losses.alignment import attention_loss_sum, focus_indices, vision_loss_sums


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return layer


def identity(width: int) -> nn.Linear:
    return linear(torch.eye(width).tolist(), [0.0] * width)


def random_linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def test_hand_computed_attention_loss() -> None:
    """One image, two teacher heads onto one student head, one row, two vision tokens."""
    adapter = linear([[2.0, 1.0]], [0.5])
    teacher = torch.tensor([[[[0.1, 0.2]], [[0.3, 0.4]]]])  # [1, 2, 1, 2]
    student = torch.tensor([[[[1.0, 2.0]]]])
    # adapted: 2 * 0.1 + 0.3 + 0.5 = 1.0 and 2 * 0.2 + 0.4 + 0.5 = 1.3
    loss = attention_loss_sum(adapter, teacher, student, torch.tensor([[7]]))
    assert loss.item() == pytest.approx(0.0**2 + 0.7**2)


def test_masked_rows_count_for_nothing() -> None:
    """The bias makes a filled-up row differ from the student's zeros, so a mask is needed."""
    adapter, rows = random_linear(3, 2), torch.tensor([[4, NO_ROW], [NO_ROW, NO_ROW], [6, 9]])
    teacher, student = torch.rand(3, 3, 2, 5), torch.rand(3, 2, 2, 5, requires_grad=True)
    loss = attention_loss_sum(adapter, teacher, student, rows)
    parts = [(0, 0), (2, 0), (2, 1)]
    wanted = sum(
        (adapter(teacher[image, :, row].T) - student[image, :, row].T).square().sum() for image, row in parts
    )
    assert torch.allclose(loss, wanted)
    (gradient,) = torch.autograd.grad(loss, student)
    for image in range(3):
        for row in range(2):
            assert bool(gradient[image, :, row].any()) == ((image, row) in parts)


def test_the_row_in_column_zero_counts() -> None:
    assert (
        attention_loss_sum(identity(1), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor([[0]]))
        == 2
    )


def test_hand_computed_vision_losses() -> None:
    """One image of three vision tokens; the focus is on tokens 0 and 2."""
    adapter = linear([[1.0, 1.0], [0.0, 2.0]], [0.0, 1.0])
    teacher = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]])  # adapted: (3, 5), (0, 1), (2, -1)
    student = torch.tensor([[[3.0, 4.0], [2.0, 1.0], [0.0, 0.0]]])  # squares: 1, 4, 5
    everything, focus = vision_loss_sums(
        adapter, teacher, student, torch.tensor([[0, 2]]), torch.tensor([[5]])
    )
    assert everything.item() == pytest.approx(10.0)
    assert focus.item() == pytest.approx(6.0)


def test_an_image_without_rows_has_no_focus() -> None:
    adapter, teacher, student = random_linear(4, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    chosen = torch.tensor([[0, 1], [2, 3]])
    rows = torch.tensor([[NO_ROW, NO_ROW], [8, NO_ROW]])
    squares = (adapter(teacher) - student).square().sum(-1)
    everything, focus = vision_loss_sums(adapter, teacher, student, chosen, rows)
    assert torch.allclose(everything, squares.sum())
    assert torch.allclose(focus, squares[1, 2:4].sum())


def test_focus_on_all_tokens_equals_all() -> None:
    adapter, teacher, student = random_linear(4, 3), torch.randn(2, 6, 4), torch.randn(2, 6, 3)
    chosen = focus_indices(torch.rand(2, 8, 3, 6), top_k=6)
    everything, focus = vision_loss_sums(adapter, teacher, student, chosen, torch.tensor([[5], [5]]))
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


def test_focus_is_per_image() -> None:
    block = torch.zeros(2, 2, 1, 4)
    block[0, :, :, 1] = 1.0
    block[1, :, :, 3] = 1.0
    assert focus_indices(block, 1).tolist() == [[1], [3]]


@pytest.mark.parametrize(("images", "rows"), [(0, 0), (2, 0)])
def test_nothing_to_compare_gives_zeros_with_a_graph(images: int, rows: int) -> None:
    heads, width = random_linear(3, 2), random_linear(4, 5)
    student_block = torch.zeros(images, 2, rows, 6, requires_grad=True)
    student_tokens = torch.zeros(images, 6, 5, requires_grad=True)
    text_rows = torch.zeros(images, rows, dtype=torch.int64)
    teacher_block = torch.zeros(images, 3, rows, 6)
    attention = attention_loss_sum(heads, teacher_block, student_block, text_rows)
    chosen = focus_indices(teacher_block, 2)
    assert chosen.shape == (images, 2)
    everything, focus = vision_loss_sums(width, torch.zeros(images, 6, 4), student_tokens, chosen, text_rows)
    assert attention.item() == focus.item() == 0.0
    (attention + everything + focus).backward()
    for parameter in (*heads.parameters(), *width.parameters()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert images == 0 or everything.item() > 0, "an image without text still takes part in L_V-all"


@pytest.mark.parametrize(("teacher_shape", "student_shape"), [(32, 16), (3, 8), (1, 5), (7, 1)])
def test_any_pair_of_heads_and_widths(teacher_shape: int, student_shape: int) -> None:
    adapter = random_linear(teacher_shape, student_shape)
    rows = torch.tensor([[3, 4]])
    attention = attention_loss_sum(
        adapter, torch.rand(1, teacher_shape, 2, 6), torch.rand(1, student_shape, 2, 6), rows
    )
    chosen = torch.tensor([[0, 1]])
    vision = vision_loss_sums(
        adapter, torch.rand(1, 6, teacher_shape), torch.rand(1, 6, student_shape), chosen, rows
    )
    for loss in (attention, *vision):
        assert loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, adapter.weight, retain_graph=True)
        assert gradient.any()


def test_half_precision_is_summed_in_single() -> None:
    adapter = random_linear(8, 4).to(torch.bfloat16)
    teacher, student = torch.rand(2, 1000, 8), torch.rand(2, 1000, 4).to(torch.bfloat16)
    rows, chosen = torch.tensor([[1], [1]]), torch.arange(1000).expand(2, -1)
    sums = vision_loss_sums(adapter, teacher.to(torch.bfloat16), student, chosen, rows)
    difference = adapter(teacher.to(torch.bfloat16)) - student
    for value in sums:
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(difference.double().square().sum().item(), rel=1e-5)
    block, student = torch.rand(1, 8, 3, 6), torch.rand(1, 4, 3, 6)  # the student's is always fp32
    attention = attention_loss_sum(adapter, block.bfloat16(), student, torch.tensor([[1, 2, 3]]))
    assert attention.dtype == torch.float32
