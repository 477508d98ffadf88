"""Equation 1, left to autograd: the block against dense softmax attention, and hand-computed losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alignkd.losses import attention
from alignkd.losses.attention import BlockLayout, attention_loss_sum, text_vision_block
from tests.losses.blocks import (
    NO_ROW,
    SCALING,
    VISION_TOKENS,
    dense_block,
    linear,
    padded_layout,
    queries_and_keys,
    random_linear,
)


def loss_of(
    adapter: nn.Linear, teacher: torch.Tensor, student: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    return attention_loss_sum(teacher, student, adapter.weight, adapter.bias, rows)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 4, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_block_and_gradients_equal_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, heads: int, key_heads: int, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(attention, "ROWS_PER_CHUNK", rows_per_chunk)
    query, key = queries_and_keys(heads, key_heads)
    layout = padded_layout()
    block, dense = text_vision_block(query, key, SCALING, layout), dense_block(query, key, layout)
    assert block.dtype == torch.float64
    assert dense[0].min() > 0
    assert not block[1].any()
    assert torch.allclose(block, dense, atol=1e-14)
    weights = torch.randn(block.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((block * weights).sum(), (query, key))
    theirs = torch.autograd.grad((dense * weights).sum(), (query, key))
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got, wanted, atol=1e-14)


def test_a_half_precision_block_is_computed_in_single() -> None:
    query, key = queries_and_keys(4, 2, torch.bfloat16)
    block = text_vision_block(query, key, SCALING, padded_layout())
    assert block.dtype == torch.float32
    # Of the same numbers: the scores, which reach 4 here, are not rounded to bf16 in between.
    expected = dense_block(query.double(), key.double(), padded_layout())
    torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-7)


def test_large_values_do_not_overflow_in_fp16() -> None:
    """fp16 ends at 65504: the products of these do not fit, the scaled scores do."""
    query, key = (150 * value for value in queries_and_keys(4, 2, torch.float16))
    assert (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).isinf().any()
    scaling = 2**-15
    block = text_vision_block(query, key, scaling, padded_layout())
    expected = dense_block(query.float() * (scaling / SCALING), key.float(), padded_layout())
    assert torch.allclose(block, expected, atol=5e-3)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0)])
def test_no_rows_give_an_empty_block(shape: tuple[int, int]) -> None:
    query, key = queries_and_keys(4, 2)
    layout = BlockLayout(((0, 0, 0),) * shape[0], torch.full(shape, NO_ROW), VISION_TOKENS)
    block = text_vision_block(query, key, SCALING, layout)
    assert block.shape == (shape[0], 4, shape[1], VISION_TOKENS)


def test_p_attn_is_a_one_by_one_convolution_over_heads() -> None:
    """The loss is that of the convolved block."""
    adapter = random_linear(5, 3)
    teacher, rows = torch.randn(2, 5, 4, 7), torch.zeros(2, 4, dtype=torch.int64)
    convolved = nn.functional.conv2d(teacher, adapter.weight[:, :, None, None], adapter.bias)
    student = torch.randn(2, 3, 4, 7)
    assert torch.allclose(loss_of(adapter, teacher, student, rows), (convolved - student).square().sum())


def test_hand_computed_attention_loss() -> None:
    """One image, two teacher heads onto one student head, one row, two vision tokens."""
    adapter = linear([[2.0, 1.0]], [0.5])
    teacher = torch.tensor([[[[0.1, 0.2]], [[0.3, 0.4]]]])  # [1, 2, 1, 2]
    student = torch.tensor([[[[1.0, 2.0]]]])
    # adapted: 2 * 0.1 + 0.3 + 0.5 = 1.0 and 2 * 0.2 + 0.4 + 0.5 = 1.3
    loss = loss_of(adapter, teacher, student, torch.tensor([[7]]))
    assert loss.item() == pytest.approx(0.0**2 + 0.7**2)


def test_rows_that_an_image_does_not_have_count_for_nothing() -> None:
    """The bias makes such a row of the teacher differ from the student's zeros, so a mask is needed."""
    adapter, rows = random_linear(3, 2), torch.tensor([[4, NO_ROW], [NO_ROW, NO_ROW], [6, 9]])
    teacher, student = torch.rand(3, 3, 2, 5), torch.rand(3, 2, 2, 5, requires_grad=True)
    loss = loss_of(adapter, teacher, student, rows)
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
    identity = linear([[1.0]], [0.0])
    assert loss_of(identity, torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor([[0]])) == 2


@pytest.mark.parametrize(("images", "rows"), [(0, 0), (2, 0)])
def test_no_rows_give_a_zero_loss_with_a_graph(images: int, rows: int) -> None:
    adapter, student = random_linear(3, 2), torch.zeros(images, 2, rows, 6, requires_grad=True)
    text_rows = torch.zeros(images, rows, dtype=torch.int64)
    loss = loss_of(adapter, torch.zeros(images, 3, rows, 6), student, text_rows)
    assert loss.item() == 0.0
    loss.backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(("teacher_heads", "heads"), [(32, 16), (3, 8), (1, 5), (7, 1)])
def test_any_pair_of_heads(teacher_heads: int, heads: int) -> None:
    adapter = random_linear(teacher_heads, heads)
    teacher, student = torch.rand(1, teacher_heads, 2, 6), torch.rand(1, heads, 2, 6)
    loss = loss_of(adapter, teacher, student, torch.tensor([[3, 4]]))
    assert loss.shape == ()
    (gradient,) = torch.autograd.grad(loss, adapter.weight)
    assert gradient.any()


def test_a_half_precision_loss_is_summed_in_single() -> None:
    adapter = random_linear(8, 4, torch.bfloat16)
    teacher, student = torch.rand(1, 8, 3, 6), torch.rand(1, 4, 3, 6)  # the student's is always fp32
    loss = loss_of(adapter, teacher.bfloat16(), student, torch.tensor([[1, 2, 3]]))
    assert loss.dtype == torch.float32
