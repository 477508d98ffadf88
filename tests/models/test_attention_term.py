"""The fused attention term against block, adapter and difference by autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from alignkd.data.batch import NO_ROW, ImagePlace
from alignkd.losses.alignment import attention_loss_sum
from alignkd.models import attention
from alignkd.models.adapters import AttentionAdapter
from alignkd.models.attention import BlockLayout, text_vision_block
from tests.models.test_attention import SCALING, VISION_TOKENS, layout, queries_and_keys

TEACHER_HEADS = 5


def packed_layout() -> BlockLayout:
    """The samples of 12, 9 and 15 columns of one row: two images (one with rows that end before the sample
    does), none, one whose text goes to the end."""
    rows = [[3, 4, 8], [9, 10, NO_ROW], [25, 34, 35]]
    places = (ImagePlace(0, 0, 3), ImagePlace(0, 5, 2), ImagePlace(2, 1, 3))
    return BlockLayout(places, torch.tensor(rows), VISION_TOKENS, (12, 9, 15))


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """[3, H, 12, D] -> [1, H, 36, D]."""
    return tensor.detach().transpose(0, 1).flatten(1, 2)[None].clone().requires_grad_()


def problem(asked: BlockLayout, key_heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    query, key = queries_and_keys(4, key_heads, dtype)
    if asked.segments:
        query, key = packed(query), packed(key)
    torch.manual_seed(0)
    adapter = AttentionAdapter(TEACHER_HEADS, 4, dtype=dtype)
    images, M = asked.text_rows_IM.shape
    target = torch.rand(images, TEACHER_HEADS, M, VISION_TOKENS).to(dtype)
    return query, key, adapter, target


def by_autograd(
    adapter: AttentionAdapter,
    target: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    asked: BlockLayout,
) -> torch.Tensor:
    block = text_vision_block(query, key, SCALING, asked)
    return attention_loss_sum(adapter, target, block, asked.text_rows_IM)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 128])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("asked", [layout(), packed_layout()], ids=["padded", "packed"])
def test_term_and_gradients_equal_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, asked: BlockLayout, key_heads: int, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(attention, "ROWS_PER_CHUNK", rows_per_chunk)
    query, key, adapter, target = problem(asked, key_heads, torch.float64)
    inputs = (query, key, adapter.weight, adapter.bias)
    term = adapter(target, query, key, SCALING, asked)
    expected = by_autograd(adapter, target, query, key, asked)
    assert torch.allclose(term, expected, rtol=1e-13)
    ours, theirs = (torch.autograd.grad(3.0 * value, inputs) for value in (term, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got, wanted, atol=1e-13)


def test_half_precision_is_summed_in_single() -> None:
    query, key, adapter, target = problem(layout(), 2, torch.bfloat16)
    term = adapter(target, query, key, SCALING, layout())
    assert term.dtype == torch.float32
    wide = AttentionAdapter(TEACHER_HEADS, 4, dtype=torch.float64)
    wide.load_state_dict(adapter.state_dict())
    expected = by_autograd(wide, target.double(), query.double(), key.double(), layout())
    assert term.item() == pytest.approx(expected.item(), rel=1e-2)
    for gradient in torch.autograd.grad(term, (query, key, adapter.weight, adapter.bias)):
        assert gradient.dtype == torch.bfloat16


def test_large_values_do_not_overflow_in_fp16() -> None:
    query, key, adapter, target = problem(layout(), 2, torch.float16)
    inputs = query, key = [(150 * value).detach().requires_grad_() for value in (query, key)]
    assert (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).isinf().any()
    term = adapter(target, query, key, 2**-15, layout())
    gradients = torch.autograd.grad(term, inputs)
    wide = [value.detach().float().requires_grad_() for value in inputs]
    expected = adapter.float()(target.float(), *wide, 2**-15, layout())
    assert term.item() == pytest.approx(expected.item(), rel=1e-2)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got.float(), wanted, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0)])
def test_nothing_asked_is_zero_with_a_graph(shape: tuple[int, int]) -> None:
    """ZeRO-3 lets go of the adapter when every input has got a gradient; a rank without images, too."""
    asked = BlockLayout((ImagePlace(0, 0, 0),) * shape[0], torch.full(shape, NO_ROW), VISION_TOKENS)
    query, key, adapter, target = problem(asked, 2, torch.float64)
    term = adapter(target, query, key, SCALING, asked)
    assert term.item() == 0.0
    for gradient in torch.autograd.grad(term, (query, key, adapter.weight, adapter.bias)):
        assert not gradient.any()


def kept_bytes(compute: Any, known: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps besides ``known``."""
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = compute()
    assert result.requires_grad
    return sum(
        size
        for address, size in kept.items()
        if address not in {t.untyped_storage().data_ptr() for t in known}
    )


def test_no_block_is_kept() -> None:
    V, columns, heads = 40, 200, 4
    rows = torch.arange(50, columns)[None]
    asked = BlockLayout((ImagePlace(0, 0, rows.shape[1]),), rows, V)
    query, key = (torch.randn(1, heads, columns, 8, requires_grad=True) for _ in range(2))
    adapter, target = AttentionAdapter(6, heads), torch.rand(1, 6, rows.shape[1], V)
    known = (query, key, adapter.weight, adapter.bias, target)
    block = 4 * heads * rows.shape[1] * V
    assert kept_bytes(partial(by_autograd, adapter, target, query, key, asked), known) > 2 * block
    assert kept_bytes(partial(adapter, target, query, key, SCALING, asked), known) == 0
