"""Compiled layers, with Dynamo's `eager` backend: it makes the same graphs and compiles no kernels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from alignkd.data.batch import Batch
from alignkd.models import attention
from alignkd.models.building import BuildOptions
from alignkd.models.compiling import compile_layers
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from tests import tiny
from tests.models.test_packing import batch_of, masked_attention

PACKINGS = (
    ("v1", "text"),
    ("text", "rounds", "plain"),
    ("rounds", "v1"),
    ("plain", "plain", "text", "v1"),
    ("v1", "rounds", "text"),
    ("plain",),
)
GPU = torch.device("cuda")  # nothing is put there


@torch.library.custom_op("alignkd_tests::varlen", mutates_args=())
def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """Opaque to Dynamo, as torch's kernel is."""
    return masked_attention(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=attention.CAUSAL
    ).contiguous()


@varlen.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    *inputs, bounds = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = masked_attention(
            *inputs, bounds, bounds, ctx.longest, ctx.longest, scale=ctx.scale, window_size=attention.CAUSAL
        )
    return *torch.autograd.grad(output, inputs, gradient), None, None, None


varlen.register_autograd(_backward, setup_context=_keep)


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def kernel(
        query: Any, key: Any, value: Any, bounds: Any, _: Any, longest: int, *__: Any, **options: Any
    ) -> Any:
        return varlen(query, key, value, bounds, longest, options["scale"])

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model: MobileVLM, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    outputs = model(batch)
    (outputs.hidden_BLD.square().sum() + outputs.first_layer.query_BHLE.square().sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_serves_all_layers_and_all_packings(checkpointing: bool) -> None:
    eager = load_model(tiny.TEACHER, BuildOptions(torch.float32)).train()
    if checkpointing:
        eager.enable_gradient_checkpointing()
    compiled = copy.deepcopy(eager)
    compile_layers(compiled, GPU, backend="eager")
    assert len(compiled.language_model.layers) > 2, "several layers share the graph"
    for names in PACKINGS:
        batch = batch_of(*names, packing=True)
        expected = gradients(eager, batch)
        found = gradients(compiled, batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1
    gradients(compiled, batch_of(packing=True))  # one masked token: torch treats sizes of 1 apart
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_without_the_kernel_it_says_that_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    with caplog.at_level(logging.WARNING):
        compile_layers(model, torch.device("cpu"))
    assert "training.compile_layers has no effect here" in caplog.text
    assert all(layer._compiled_call_impl is None for layer in model.language_model.layers)
