"""Attention of the language model: SDPA in every layer, and the text x vision block of layer 0 on the side.

``output_attentions`` would keep [B, H, L, L] for all layers. What Align-KD needs is one block of one layer:
how the text tokens after an image attend to its vision tokens. The registered function below leaves the
layer's output alone and hands the same (rotated) queries and keys to whoever wants that block. No mask is
ever built: right padding needs none under causal attention, and packed samples run one by one.

Shapes: B rows, H query heads, G key heads, L columns, D width of a head, I images, M most text rows of an
image, V vision tokens of an image, C rows of a chunk, l length of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alignkd.data.batch import Batch, ImagePlace

ATTENTION_NAME = "alignkd_sdpa"
ROWS_PER_CHUNK = 128


@dataclass(frozen=True)
class BlockLayout:
    """Which rows and columns of layer 0 are wanted."""

    places: tuple[ImagePlace, ...]  # I
    text_rows_IM: torch.Tensor  # int64, columns of the batch's rows, negative where an image has fewer
    vision_tokens: int  # V
    segments: tuple[int, ...] = ()  # lengths of packed samples; empty: every row is a sample

    @classmethod
    def of(cls, batch: Batch, vision_tokens: int) -> BlockLayout:
        return cls(batch.image_places, batch.text_rows_IM, vision_tokens, batch.segments)


# (query_BHLD, key_BGLD, scaling, layout) -> what is made of the block
BlockConsumer = Callable[[torch.Tensor, torch.Tensor, float, BlockLayout], torch.Tensor]


@dataclass
class BlockRequest:
    """Travels as a keyword argument through transformers' layers down to the attention function; layer 0
    leaves the consumer's answer in ``answer``."""

    layout: BlockLayout
    consumer: BlockConsumer
    answer: torch.Tensor | None = None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_request: BlockRequest | None = None,
    segments: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers runs it, within ``segments`` of the only row if there are any; plus the requested
    block in layer 0."""
    if block_request is not None and module.layer_idx == 0:
        answer = block_request.consumer(query, key, float(kwargs["scaling"]), block_request.layout)
        # Gradient checkpointing runs the layer a second time in backward; the first answer is the one in use.
        if block_request.answer is None:
            block_request.answer = answer
    if len(segments) < 2:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    outputs = []
    for parts in _runs((query, key, value), segments):
        output_BLHD, _ = sdpa_attention_forward(module, *parts, None, **kwargs)
        outputs.append(output_BLHD.flatten(0, 1)[None])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _runs(tensors: Sequence[torch.Tensor], segments: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """[1, H, L, D] each -> neighbours of equal length as one batch [n, H, l, D].

    Split at once: backward then writes one gradient, where slices would each make one of full length.
    """
    runs = [(length, len(list(same))) for length, same in groupby(segments)]
    pieces = [torch.split(tensor, [length * count for length, count in runs], dim=2) for tensor in tensors]
    for (length, count), *of_run in zip(runs, *pieces, strict=True):
        yield tuple(piece.unflatten(2, (count, length))[0].transpose(0, 1) for piece in of_run)


def text_vision_block(
    query_BHLD: torch.Tensor, key_BGLD: torch.Tensor, scaling: float, layout: BlockLayout
) -> torch.Tensor:
    """Post-softmax probabilities [I, H, M, V] in fp32 (or wider): softmax over all causal keys of the
    image's own sample, vision columns taken.

    G key heads serve H query heads (grouped-query attention). Rows that are filled up are zero.
    Differentiable; the full rows of a chunk are recomputed in backward, so that only M x V per head outlives
    the call.
    """
    images, M = layout.text_rows_IM.shape
    shape = (images, query_BHLD.shape[1], M, layout.vision_tokens)
    if images == 0 or M == 0:
        # Joined to the graph all the same: under ZeRO-3 all ranks' backward passes touch the same modules.
        return query_BHLD.new_zeros(shape, dtype=at_least_fp32(query_BHLD.dtype)) + query_BHLD[:0].sum()
    blocks: list[list[torch.Tensor]] = [[] for _ in range(images)]
    for chunk in block_chunks(query_BHLD, key_BGLD, layout):
        blocks[chunk.image].append(recomputed(chunk_block, *chunk.arguments, scaling))
    padded = [
        torch.nn.functional.pad(torch.cat(chunks, dim=1), (0, 0, 0, M - place.rows))
        if chunks
        else query_BHLD.new_zeros(shape[1:], dtype=at_least_fp32(query_BHLD.dtype))
        for chunks, place in zip(blocks, layout.places, strict=True)
    ]
    return torch.stack(padded)


class BlockChunk(NamedTuple):
    """Some rows of one image, and what :func:`chunk_block` takes."""

    image: int
    rows: slice  # of the image's text rows
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]


def block_chunks(
    query_BHLD: torch.Tensor, key_BGLD: torch.Tensor, layout: BlockLayout
) -> Iterator[BlockChunk]:
    """Everything that the block consists of, a limited number of rows at a time, without padding."""
    queries, keys = (_samples(tensor, layout.segments) for tensor in (query_BHLD, key_BGLD))
    begins = [0]
    for length in layout.segments:
        begins.append(begins[-1] + length)
    for image, place in enumerate(layout.places):
        begin = begins[place.sample] if layout.segments else 0
        for first in range(0, place.rows, ROWS_PER_CHUNK):
            rows = slice(first, min(first + ROWS_PER_CHUNK, place.rows))
            rows_C = layout.text_rows_IM[image, rows] - begin
            stop = place.start + layout.vision_tokens
            arguments = (queries[place.sample], keys[place.sample], rows_C, place.start, stop)
            yield BlockChunk(image, rows, arguments)


def _samples(tensor_BHLD: torch.Tensor, segments: tuple[int, ...]) -> Sequence[torch.Tensor]:
    """[H, l, D] of every sample."""
    return torch.split(tensor_BHLD[0], list(segments), dim=1) if segments else tensor_BHLD.unbind(0)


def chunk_block(
    query_HlD: torch.Tensor,
    key_GlD: torch.Tensor,
    rows_C: torch.Tensor,
    start: int,
    stop: int,
    scaling: float,
) -> torch.Tensor:
    """[H, C, V]: rows ``rows_C`` of one sample, columns ``start`` to ``stop``, both counted within it. Whole
    rows of scores exist only in here."""
    query_HCD = query_HlD[:, rows_C]
    G, length, _ = key_GlD.shape
    H, C, _ = query_HCD.shape
    scores = query_HCD.reshape(G, H // G * C, -1) @ key_GlD.transpose(1, 2)
    scores = (scores.to(at_least_fp32(scores.dtype)) * scaling).view(H, C, length)
    columns_l = torch.arange(length, device=scores.device)
    scores = scores.masked_fill(columns_l > rows_C[:, None], float("-inf"))
    return (scores[..., start:stop] - scores.logsumexp(dim=2, keepdim=True)).exp()


def recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``function``'s value; what its backward needs is made again then, from the tensors in ``arguments``.

    Those must be arguments of their own: inside another object an outer checkpoint could not let go of them.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: torch.Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# No mask function goes with it: without one transformers builds no mask, and does not look for packed
# sequences in the positions either, for which the host would wait for the device.
AttentionInterface.register(ATTENTION_NAME, attention)
