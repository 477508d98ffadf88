"""Some layers of teacher and student, eager and compiled, with either attention, over several packings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from alignkd.models.attention import Packing
from benchmarks.gpu.packed import attending, random_packing
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import TINY_PAIR, Sizes
from benchmarks.gpu.timing import kernels, timed, wait
from benchmarks.models import Decoder, model_config, random_model

# (loop, compiled); last what takes longest: a graph for every packing.
WAYS = ((False, False), (True, False), (False, True), (True, True))


def measure(sizes: Sizes) -> Iterator[Row]:
    tokens = sizes.packed_tokens[0]
    # Token budgets are not met exactly: no two rows are of one length.
    packings = [random_packing(tokens - 3 * number, sizes, seed=number) for number in range(sizes.packings)]
    sides = (("teacher", sizes.shallow.teacher, False), ("student", sizes.shallow.student, True))
    for loop, compiled in WAYS:
        for side, decoder, trains in sides:
            way = f"{'loop' if loop else 'variable length'}, {'compiled' if compiled else 'eager'}"
            what = f"{side}, {decoder.layers} layers, {tokens} tokens, {way}"
            try:
                used = [packing._replace(kernel=packing.kernel and not loop) for packing in packings]
                with attending(loop):
                    yield {"what": what, **_measured(sizes, decoder, compiled, trains, used)}
            except Exception as error:  # of a compiler, say: the other ways still count
                yield {"what": what, "error": f"{type(error).__name__}: {error}"[:300]}


def _measured(sizes: Sizes, decoder: Decoder, compiled: bool, trains: bool, packings: list[Packing]) -> Row:
    torch._dynamo.reset()
    counters.clear()
    model = random_model(model_config(decoder, TINY_PAIR.tower), sizes.dtype, sizes.device, 0).language_model
    model.requires_grad_(trains)
    if compiled:
        for layer in model.layers[1:]:  # the first one has an attention function of its own
            layer.compile(backend=sizes.compiler, dynamic=True)
    calls = [_call(model, packing, trains, sizes) for packing in packings]
    started = time.perf_counter()
    graphs = []
    for call in calls:
        call()
        graphs.append(counters["stats"]["unique_graphs"])
    wait(sizes.device)
    first = time.perf_counter() - started
    times = [timed(call, sizes.device, sizes.rounds, warm_up=0) for call in calls]
    found = kernels(calls[0], sizes.device)
    return {
        "ms": statistics.median(taken.device_ms for taken in times),
        "host ms": statistics.median(taken.host_ms for taken in times),
        "kernels": found.count,
        "first calls s": first,
        "graphs after 1 packing": graphs[0],
        f"after {len(packings)}": graphs[-1],
    }


def _call(model: Any, packing: Packing, trains: bool, sizes: Sizes) -> Callable[[], None]:
    tokens = sum(packing.lengths)
    embeddings = torch.randn(1, tokens, model.config.hidden_size, device=sizes.device, dtype=sizes.dtype)
    positions = torch.cat([torch.arange(length, device=sizes.device) for length in packing.lengths])[None]
    run = partial(
        model,
        inputs_embeds=embeddings,
        position_ids=positions,
        use_cache=False,
        packing=packing,
    )

    def call() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(trains):
            hidden = run().last_hidden_state
        if trains:
            hidden.backward(embeddings)

    return call
