"""Images that differ in their number of vision tokens, which need not be consecutive; sliding windows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alignkd.losses import attention
from alignkd.losses.attention import (
    BlockLayout,
    fused_attention_loss,
    plain_attention_loss,
    text_vision_block,
)
from alignkd.losses.vision import focus_indices, vision_loss_sums
from tests.losses.blocks import NO_ROW, SCALING, queries_and_keys, random_linear

COLUMNS = torch.tensor([[1, 2, 4, 5], [0, 2, -1, -1], [3, -1, -1, -1]])
ROWS = torch.tensor([[6, 8, 9, 11], [7, 10, NO_ROW, NO_ROW], [4, 5, 6, 11]])
SPANS = ((4, 5), (2, 3), (1, 1))
PLACES = ((0, 1, 4), (1, 0, 2), (2, 3, 4))
TEACHER_HEADS = 5


def layout(window: int | None = None) -> BlockLayout:
    """An image in two tiles of two tokens, one of two tokens with something between them, one of one."""
    return BlockLayout(PLACES, ROWS, 4, (), COLUMNS, SPANS, window)


def dense(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """The block out of [B, H, L, L]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * SCALING
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if window is not None:
        seen &= seen.new_ones(seen.shape).triu(1 - window)
    maps = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    block = maps.new_zeros(len(PLACES), query.shape[1], ROWS.shape[1], COLUMNS.shape[1])
    for image, (sample, _, _) in enumerate(PLACES):
        for place, row in enumerate(ROWS[image].tolist()):
            columns = [column for column in COLUMNS[image].tolist() if column >= 0]
            if row != NO_ROW:
                block[image, :, place, : len(columns)] = maps[sample, :, row, columns]
    return block


@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 128])
def test_the_block_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, window: int | None
) -> None:
    monkeypatch.setattr(attention, "ROWS_PER_CHUNK", rows_per_chunk)
    query, key = queries_and_keys(4, 2)
    block = text_vision_block(query, key, SCALING, layout(window))
    assert torch.allclose(block, dense(query, key, window), atol=1e-12)
    assert block.any() == (window != 1)  # a window of one shows a row itself only


@pytest.mark.parametrize("window", [None, 7])
def test_both_forms_of_the_loss_and_its_gradients_are_the_dense_ones(window: int | None) -> None:
    query, key = queries_and_keys(4, 2)
    adapter = random_linear(TEACHER_HEADS, 4, torch.float64)
    teacher = torch.rand(3, TEACHER_HEADS, 4, 4, dtype=torch.float64)  # also where nothing is
    inputs = (query, key, adapter.weight, adapter.bias)
    given = partial(dict, teacher_block_ITMV=teacher, scaling=SCALING, layout=layout(window))
    losses = [form(*inputs, **given()) for form in (fused_attention_loss, plain_attention_loss)]
    difference = dense(query, key, window) - adapter(teacher.movedim(1, -1)).movedim(-1, 1)
    counts = (ROWS >= 0)[:, None, :, None] & (COLUMNS >= 0)[:, None, None]
    losses.append((difference.square() * counts).sum())
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
    for loss, of_loss in zip(losses, gradients, strict=True):
        assert torch.allclose(loss, losses[-1], rtol=1e-12)
        for got, wanted in zip(of_loss, gradients[-1], strict=True):
            assert wanted.any()
            assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_the_focus_is_on_tokens_that_an_image_has() -> None:
    """Image 1 has two tokens that nobody looks at: the two that it does not have are not chosen instead."""
    block = torch.zeros(2, 1, 2, 4)
    block[0, 0, :, 3] = 0.7
    block[0, 0, :, 1] = 0.2
    filled = torch.tensor([[True] * 4, [True, True, False, False]])
    chosen = focus_indices(block, 3, filled)
    assert chosen[0, :2].tolist() == [3, 1]
    assert sorted(chosen[1, :2].tolist()) == [0, 1]


def test_a_focus_on_more_tokens_than_there_are_is_on_all() -> None:
    assert sorted(focus_indices(torch.rand(1, 2, 3, 4), 9)[0].tolist()) == [0, 1, 2, 3]


def test_vision_losses_leave_out_what_an_image_does_not_have() -> None:
    adapted, student = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    filled = torch.tensor([[True] * 4, [True, False, False, False]])
    squares = (adapted - student).square().sum(-1)
    chosen = torch.tensor([[2, 0], [0, 1]])
    everything, focus = vision_loss_sums(
        adapted, student, chosen, torch.zeros(2, 1, dtype=torch.long), filled
    )
    assert torch.allclose(everything, squares[0].sum() + squares[1, 0])
    assert torch.allclose(focus, squares[0, 2] + squares[0, 0] + squares[1, 0])
