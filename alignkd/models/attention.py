"""Attention of the language model: SDPA in every layer, and the queries and keys of layer 0 handed out.

``output_attentions`` would keep [B, H, L, L] for all layers. Whoever needs a part of the first layer's map
computes it from the (rotated) queries and keys, which the function below hands out without touching the
layer's output. No mask is ever built: right padding needs none under causal attention, and packed samples run
one by one.

Shapes: B rows, L columns, H query heads, G key heads, E width of a head, S length of a packed sample, n
neighbouring samples of equal length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "alignkd_sdpa"


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


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    first_layer: FirstLayerCapture | None = None,
    segments: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers runs it, within each of the ``segments`` of the only row if there are any."""
    if first_layer is not None and module.layer_idx == 0:
        first_layer.offer(FirstLayerAttention(query, key, float(kwargs["scaling"])))
    if len(segments) < 2:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    outputs = []
    for parts in _runs((query, key, value), segments):
        output_nSHE, _ = sdpa_attention_forward(module, *parts, None, **kwargs)
        outputs.append(output_nSHE.flatten(0, 1)[None])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _runs(tensors: Sequence[torch.Tensor], segments: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """[1, H, L, E] each -> neighbours of equal length as one batch [n, H, S, E].

    Split at once: backward then writes one gradient, where slices would each write one of full length.
    """
    runs = [(length, len(list(same))) for length, same in groupby(segments)]
    pieces = [torch.split(tensor, [length * count for length, count in runs], dim=2) for tensor in tensors]
    for (length, count), *of_run in zip(runs, *pieces, strict=True):
        yield tuple(piece.unflatten(2, (count, length))[0].transpose(0, 1) for piece in of_run)


# No mask function is registered with it: without one transformers builds no mask, and does not look for
# packed sequences in the positions either, for which the host would wait for the device.
AttentionInterface.register(ATTENTION_NAME, attention)
