"""Attention within the samples of a packed row: the product's loop against one variable-length kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from benchmarks.gpu.ceilings import cudnn_attention
from benchmarks.gpu.packed import LOOP, VARIABLE, Packing, random_packing
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import kernels, timed

Tensors = list[torch.Tensor]


class Layer(nn.Module):
    """As much of a layer as an attention function asks for: not the first one of a model without grouped
    queries."""

    layer_idx = 1
    num_key_value_groups = 1
    is_causal = True


def measure(sizes: Sizes) -> Iterator[Row]:
    for tokens in sizes.packed_tokens:
        packing = random_packing(tokens, sizes, seed=tokens)
        heads = sizes.pair.teacher.heads
        shape = (1, tokens, heads, sizes.pair.teacher.width // heads)
        inputs = [_random(shape, sizes).requires_grad_() for _ in range(3)]
        upstream = _random(shape, sizes)
        exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
        with sdpa_kernel(SDPBackend.MATH):
            expected = _run(LOOP, packing, exact, upstream.float())
        for name, cudnn in ((VARIABLE, False), (LOOP, False), (LOOP, True)):
            with cudnn_attention(cudnn):
                call = partial(_run, name, packing, inputs, upstream)
                errors = _errors(call(), expected)
                taken = timed(call, sizes.device, sizes.rounds)
                found = kernels(call, sizes.device)
            way = f"loop, cuDNN {'on' if cudnn else 'off'}" if name == LOOP else "variable length"
            yield {
                "what": f"{tokens} tokens, {len(packing.segments)} samples, {way}",
                "ms": taken.device_ms,
                "host ms": taken.host_ms,
                "kernels": found.count,
                "kernels' ms": found.busy_ms,
                "error of the output": errors[0],
                "largest of the gradients": max(errors[1:]),
            }


def _random(shape: tuple[int, ...], sizes: Sizes) -> torch.Tensor:
    return torch.randn(shape, device=sizes.device, dtype=sizes.dtype)


def _run(name: str, packing: Packing, inputs_1LHD: Tensors, upstream_1LHD: torch.Tensor) -> Tensors:
    """Output and gradients, of queries, keys and values as a layer's projections lay them out."""
    attend: Callable[..., tuple[torch.Tensor, None]] = AttentionInterface()[name]
    for tensor in inputs_1LHD:
        tensor.grad = None
    transposed = (tensor.transpose(1, 2) for tensor in inputs_1LHD)
    scaling = inputs_1LHD[0].shape[-1] ** -0.5
    output, _ = attend(Layer(), *transposed, None, scaling=scaling, **packing.arguments(name))
    output.backward(upstream_1LHD)  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in inputs_1LHD]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _errors(found: Tensors, expected: Tensors) -> list[float]:
    """Relative, by the norm."""
    return [
        float((tensor.float() - exact).norm() / exact.norm())
        for tensor, exact in zip(found, expected, strict=True)
    ]
