"""Attention within the samples of a packed row: the product's loop against one variable-length kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignkd.models.attention import Packing, attention
from benchmarks.gpu.packed import WAYS, attending, random_packing
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import kernels, timed

Tensors = list[torch.Tensor]


class Layer(nn.Module):
    """What an attention function asks of its layer."""

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
        with attending(loop=True), sdpa_kernel(SDPBackend.MATH):
            expected = _run(packing._replace(kernel=False), exact, upstream.float())
        for way, loop, cudnn in WAYS:
            with attending(loop, cudnn):
                used = packing._replace(kernel=packing.kernel and not loop)
                call = partial(_run, used, inputs, upstream)
                errors = _errors(call(), expected)
                taken = timed(call, sizes.device, sizes.rounds)
                found = kernels(call, sizes.device)
            yield {
                "what": f"{tokens} tokens, {len(packing.lengths)} samples, {way}",
                "ms": taken.device_ms,
                "host ms": taken.host_ms,
                "kernels": found.count,
                "kernels' ms": found.busy_ms,
                "error of the output": errors[0],
                "largest of the gradients": max(errors[1:]),
            }


def _random(shape: tuple[int, ...], sizes: Sizes) -> torch.Tensor:
    return torch.randn(shape, device=sizes.device, dtype=sizes.dtype)


def _run(packing: Packing, inputs_1LHE: Tensors, upstream_1LHE: torch.Tensor) -> Tensors:
    """Output and gradients of queries, keys and values, laid out as by a layer's projections."""
    for tensor in inputs_1LHE:
        tensor.grad = None
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs_1LHE)
    scaling = query.shape[-1] ** -0.5
    output, _ = attention(Layer(), query, key, value, None, packing=packing, scaling=scaling)
    output.backward(upstream_1LHE)  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in inputs_1LHE]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _errors(found: Tensors, expected: Tensors) -> list[float]:
    """Relative, by the norm."""
    return [
        float((tensor.float() - exact).norm() / exact.norm())
        for tensor, exact in zip(found, expected, strict=True)
    ]
