"""Attention of the language model: SDPA in every layer, and the queries and keys of layer 0 handed out.

``output_attentions`` would keep [B, H, L, L] for all layers. Whoever needs a part of the first layer's map
computes it from the (rotated) queries and keys, which the function below hands out without touching the
layer's output. No mask is ever built: right padding needs none under causal attention, and packed samples go
to a variable-length kernel or, where there is none (CPU, fp32), run one by one.

Shapes: B rows, L columns, H query heads, G key heads, E width of a head, S length of a packed sample, n
neighbouring samples of equal length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkd.data.batch import Batch

ATTENTION_NAME = "alignkd_sdpa"
FIRST_ATTENTION_NAME = "alignkd_first_sdpa"
MASKED_ATTENTION_NAME = "alignkd_masked_sdpa"
FIRST_MASKED_ATTENTION_NAME = "alignkd_first_masked_sdpa"
FLASH_HEAD_WIDTH = 256  # at most
LENGTH_STEP = 128  # the kernel's longest length is rounded up, so that compiled guards see few of them
CAUSAL = (-1, 0)  # keys to the left and to the right of a query: all, none


class FirstLayerAttention(NamedTuple):
    """What the attention map of layer 0 is made of, after rotary embedding, with a graph.

    A tuple, because ZeRO-3's hooks find tensors in tuples, lists and dicts only.
    """

    query_BHLE: torch.Tensor
    key_BGLE: torch.Tensor
    scaling: float  # factor of query x key


class FirstLayerCapture:
    """Travels as a keyword argument through transformers' layers down to the attention function.

    Gradient checkpointing runs layer 0 a second time in backward, so only the first call is captured; and it
    keeps its arguments until then, so :meth:`take` leaves nothing behind.
    """

    def __init__(self) -> None:
        self._wanted = True
        self._attention: FirstLayerAttention | None = None

    def offer(self, attention: FirstLayerAttention) -> None:
        if self._wanted:
            self._wanted, self._attention = False, attention

    def take(self) -> FirstLayerAttention:
        attention, self._attention = self._attention, None
        assert attention is not None, "layer 0 has run"
        return attention


class Packing(NamedTuple):
    """Several samples in the only row: what attention needs to keep them apart."""

    lengths: tuple[int, ...]  # of the samples, for the loop
    bounds: torch.Tensor  # int32 [samples + 1]: columns at which they begin, and the end; for the kernel
    longest: int  # rounded up, so that compiled layers see few different values
    kernel: bool  # is there a variable-length kernel?


def packing_of(batch: Batch, embeddings_BLD: torch.Tensor, head_width: int) -> Packing | None:
    """None where plain causal attention does: padded rows, or a single sample and no kernel. With a kernel, a
    single sample goes there, too, so that compiled layers need no second graph."""
    kernel = has_varlen_kernel(embeddings_BLD.device, embeddings_BLD.dtype, head_width)
    if not batch.segments or (len(batch.segments) == 1 and not kernel):
        return None
    assert batch.segment_bounds is not None, "a packed batch has bounds"
    longest = -(-max(batch.segments) // LENGTH_STEP) * LENGTH_STEP
    return Packing(batch.segments, batch.segment_bounds, longest, kernel)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers runs it, within each of the samples of a packed row."""
    if packing is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    if packing.kernel:
        return _varlen(query, key, value, packing, float(kwargs["scaling"])), None
    outputs = []
    for parts in _runs((query, key, value), packing.lengths):
        output_nSHE, _ = sdpa_attention_forward(module, *parts, None, **kwargs)
        outputs.append(output_nSHE.flatten(0, 1)[None])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def first_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    *arguments: Any,
    first_layer: FirstLayerCapture | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """:func:`attention` of layer 0. A function of its own, so that the other layers need not ask which one
    they are: compiled, they are one graph."""
    if first_layer is not None:
        first_layer.offer(FirstLayerAttention(query, key, float(kwargs["scaling"])))
    return attention(module, query, key, *arguments, **kwargs)


def capture_first_layer(model: LlamaModel) -> None:
    """Give layer 0 its own attention function."""
    own = copy.copy(model.layers[0].self_attn.config)
    own._attn_implementation = FIRST_ATTENTION_NAME
    model.layers[0].self_attn.config = own


def use_plain_attention(model: LlamaModel) -> None:
    """Undo the above for generation: transformers' own SDPA, with the masks that left padding needs."""
    model.set_attn_implementation("sdpa")
    model.layers[0].self_attn.config = model.config


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Flash attention, which torch ships for GPUs from Ampere on, in 16 bits."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width <= FLASH_HEAD_WIDTH
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _varlen(
    query_1HLE: torch.Tensor,
    key_1GLE: torch.Tensor,
    value_1GLE: torch.Tensor,
    packing: Packing,
    scaling: float,
) -> torch.Tensor:
    """[1, L, H, E]. One kernel for all samples, where a loop would launch some for each."""
    shared = query_1HLE.shape[1] // key_1GLE.shape[1]
    if shared > 1:  # `enable_gqa` came after torch 2.11
        key_1GLE, value_1GLE = (x.repeat_interleave(shared, dim=1) for x in (key_1GLE, value_1GLE))
    query_LHE, key_LHE, value_LHE = (x[0].transpose(0, 1) for x in (query_1HLE, key_1GLE, value_1GLE))
    bounds, longest = packing.bounds, packing.longest
    output_LHE = varlen_attn(
        query_LHE, key_LHE, value_LHE, bounds, bounds, longest, longest, scale=scaling, window_size=CAUSAL
    )
    assert isinstance(output_LHE, torch.Tensor), "no auxiliary outputs were asked for"
    return output_LHE[None]


def _runs(tensors: Sequence[torch.Tensor], segments: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """[1, H, L, E] each -> neighbours of equal length as one batch [n, H, S, E].

    Split at once: backward then writes one gradient, where slices would each write one of full length.
    """
    runs = [(length, len(list(same))) for length, same in groupby(segments)]
    pieces = [torch.split(tensor, [length * count for length, count in runs], dim=2) for tensor in tensors]
    for (length, count), *of_run in zip(runs, *pieces, strict=True):
        yield tuple(piece.unflatten(2, (count, length))[0].transpose(0, 1) for piece in of_run)


# No mask functions are registered with them: without one transformers builds no mask, and does not look for
# packed sequences in the positions either, for which the host would wait for the device.
AttentionInterface.register(ATTENTION_NAME, attention)
AttentionInterface.register(FIRST_ATTENTION_NAME, first_attention)
# For models with sliding windows or images whose vision tokens see one another. Without a mask function these
# would get no mask, and be wrong without a word.
AttentionInterface.register(MASKED_ATTENTION_NAME, attention)
AttentionInterface.register(FIRST_MASKED_ATTENTION_NAME, first_attention)
for _name in (MASKED_ATTENTION_NAME, FIRST_MASKED_ATTENTION_NAME):
    AttentionMaskInterface.register(_name, sdpa_mask)
