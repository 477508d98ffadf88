"""The fused form of equation 1 against the plain one: values, gradients, what is kept for backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from alignkd.losses import attention
from alignkd.losses.attention import BlockLayout, fused_attention_loss, plain_attention_loss
from tests.losses.blocks import (
    NO_ROW,
    SCALING,
    VISION_TOKENS,
    packed,
    packed_layout,
    padded_layout,
    queries_and_keys,
    random_linear,
)

TEACHER_HEADS = 5
Problem = tuple[torch.Tensor, torch.Tensor, nn.Linear, torch.Tensor]


def problem(layout: BlockLayout, key_heads: int, dtype: torch.dtype) -> Problem:
    """(queries, keys, P_attn, the teacher's block)."""
    query, key = queries_and_keys(4, key_heads, dtype)
    if layout.segments:
        query, key = packed(query), packed(key)
    adapter = random_linear(TEACHER_HEADS, 4, dtype)
    images, M = layout.text_rows_IM.shape
    block = torch.rand(images, TEACHER_HEADS, M, VISION_TOKENS).to(dtype)
    return query, key, adapter, block


def loss_of(
    form: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    adapter: nn.Linear,
    block: torch.Tensor,
    layout: BlockLayout,
    scaling: float = SCALING,
) -> torch.Tensor:
    loss: torch.Tensor = form(
        query,
        key,
        adapter.weight,
        adapter.bias,
        teacher_block_ITMV=block,
        scaling=scaling,
        layout=layout,
    )
    return loss


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 128])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", [padded_layout(), packed_layout()], ids=["padded", "packed"])
def test_loss_and_gradients_equal_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, layout: BlockLayout, key_heads: int, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(attention, "ROWS_PER_CHUNK", rows_per_chunk)
    query, key, adapter, block = problem(layout, key_heads, torch.float64)
    inputs = (query, key, adapter.weight, adapter.bias)
    fused = loss_of(fused_attention_loss, query, key, adapter, block, layout)
    plain = loss_of(plain_attention_loss, query, key, adapter, block, layout)
    assert torch.allclose(fused, plain, rtol=1e-13)
    ours, theirs = (torch.autograd.grad(3.0 * value, inputs) for value in (fused, plain))
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got, wanted, atol=1e-13)


def test_half_precision_is_summed_in_single() -> None:
    query, key, adapter, block = problem(padded_layout(), 2, torch.bfloat16)
    loss = loss_of(fused_attention_loss, query, key, adapter, block, padded_layout())
    assert loss.dtype == torch.float32
    wide = nn.Linear(TEACHER_HEADS, 4, dtype=torch.float64)
    wide.load_state_dict(adapter.state_dict())
    doubles = query.double(), key.double(), wide, block.double()
    assert loss.item() == pytest.approx(
        loss_of(plain_attention_loss, *doubles, padded_layout()).item(), rel=1e-2
    )
    for gradient in torch.autograd.grad(loss, (query, key, adapter.weight, adapter.bias)):
        assert gradient.dtype == torch.bfloat16


def test_large_values_do_not_overflow_in_fp16() -> None:
    query, key, adapter, block = problem(padded_layout(), 2, torch.float16)
    inputs = query, key = [(150 * value).detach().requires_grad_() for value in (query, key)]
    assert (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).isinf().any()
    loss = loss_of(fused_attention_loss, *inputs, adapter, block, padded_layout(), 2**-15)
    gradients = torch.autograd.grad(loss, inputs)
    wide = [value.detach().float().requires_grad_() for value in inputs]
    expected = loss_of(fused_attention_loss, *wide, adapter.float(), block.float(), padded_layout(), 2**-15)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, wide), strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got.float(), wanted, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("form", [fused_attention_loss, plain_attention_loss])
@pytest.mark.parametrize("shape", [(0, 0), (2, 0)])
def test_no_rows_give_zero_with_a_graph(shape: tuple[int, int], form: Any) -> None:
    """ZeRO-3 releases P_attn once every input has its gradient, on a rank without images too."""
    layout = BlockLayout(((0, 0, 0),) * shape[0], torch.full(shape, NO_ROW), VISION_TOKENS)
    query, key, adapter, block = problem(layout, 2, torch.float64)
    loss = loss_of(form, query, key, adapter, block, layout)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (query, key, adapter.weight, adapter.bias)):
        assert not gradient.any()


def kept_bytes(compute: Any, known: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps in addition to ``known``."""
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


def test_no_block_is_kept_for_backward() -> None:
    V, columns, heads = 40, 200, 4
    rows = torch.arange(50, columns)[None]
    layout = BlockLayout(((0, 0, rows.shape[1]),), rows, V)
    query, key = (torch.randn(1, heads, columns, 8, requires_grad=True) for _ in range(2))
    adapter, block = random_linear(6, heads), torch.rand(1, 6, rows.shape[1], V)
    known = (query, key, adapter.weight, adapter.bias, block)
    block_bytes = 4 * heads * rows.shape[1] * V
    compute = partial(
        loss_of, query=query, key=key, adapter=adapter, block=block, layout=layout, scaling=SCALING
    )
    assert kept_bytes(partial(compute, plain_attention_loss), known) > 2 * block_bytes
    assert kept_bytes(partial(compute, fused_attention_loss), known) == 0
