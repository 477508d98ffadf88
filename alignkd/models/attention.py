"""Attention of the language model: SDPA in every layer, and the text x vision block of layer 0 on the side.

``output_attentions`` would keep [B, H, L, L] for all layers. What Align-KD needs is one block of one layer:
how the text tokens after an image attend to its vision tokens. The registered function below leaves the
layer's output alone and hands the same (rotated) queries and keys to whoever wants that block. No mask is
ever built: right padding needs none under causal attention, and packed samples run one by one.

Shapes: B rows, H query heads, G key heads, L columns, D width of a head, I images, M most text rows of an
image, V vision tokens of an image, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
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

    G key heads serve H query heads (grouped-query attention). Rows that are filled up are zero. For the
    teacher, and the reference of what is fused for the student (``models.attention_term``).
    """
    images, M = layout.text_rows_IM.shape
    shape = (images, query_BHLD.shape[1], M, layout.vision_tokens)
    block_IHMV = query_BHLD.new_zeros(shape, dtype=at_least_fp32(query_BHLD.dtype))
    for chunk in block_chunks(layout, query_BHLD.shape[2]):
        maps_HCk = attention_rows(query_BHLD, key_BGLD, scaling, chunk)
        block_IHMV[chunk.image, :, chunk.rows] = maps_HCk[..., chunk.vision]
    return block_IHMV


class Chunk(NamedTuple):
    """Some text rows of one image. k: keys that they can see."""

    image: int
    rows: slice  # of the image's text rows
    rows_C: torch.Tensor  # int64, their columns in the batch's row
    batch_row: int
    keys: slice  # columns of the batch's row, from the beginning of the sample
    vision: slice  # of those keys
    seen_by_all: int  # of those keys, the first so many


def block_chunks(layout: BlockLayout, columns: int) -> Iterator[Chunk]:
    """All valid rows, a limited number at a time. ``columns``: L. Nothing is asked of the device."""
    begins = [0, *accumulate(layout.segments)]
    for image, place in enumerate(layout.places):
        batch_row, begin, length = place.sample, 0, columns
        if layout.segments:
            batch_row, begin, length = 0, begins[place.sample], layout.segments[place.sample]
        vision = slice(place.start, place.start + layout.vision_tokens)
        for first in range(0, place.rows, ROWS_PER_CHUNK):
            rows = slice(first, min(first + ROWS_PER_CHUNK, place.rows))
            # Rows ascend, so behind the chunk's last one there is room for all that follow: exact where a
            # sample ends in text, and never too few keys.
            seen = length - (place.rows - rows.stop)
            yield Chunk(
                image=image,
                rows=rows,
                rows_C=layout.text_rows_IM[image, rows],
                batch_row=batch_row,
                keys=slice(begin, begin + seen),
                vision=vision,
                # The image and the rows of earlier chunks come before every row of this one.
                seen_by_all=vision.stop + first,
            )


def attention_rows(
    query_BHLD: torch.Tensor, key_BGLD: torch.Tensor, scaling: float, chunk: Chunk
) -> torch.Tensor:
    """Probabilities [H, C, k] in fp32 (or wider), zero where the key comes after the row. The only place
    where whole rows of attention exist."""
    query_HCD = scaled_queries(query_BHLD, scaling, chunk)
    key_GkD = key_BGLD[chunk.batch_row, :, chunk.keys]
    H, C, _ = query_HCD.shape
    G, k, _ = key_GkD.shape
    scores = query_HCD.reshape(G, H // G * C, -1) @ key_GkD.transpose(1, 2)
    scores = scores.to(at_least_fp32(scores.dtype)).view(H, C, k)
    first, end = chunk.keys.start + chunk.seen_by_all, chunk.keys.stop
    columns_t = torch.arange(first, end, device=scores.device)
    scores[..., chunk.seen_by_all :].masked_fill_(columns_t > chunk.rows_C[:, None], float("-inf"))
    return scores.softmax(dim=2)


def scaled_queries(query_BHLD: torch.Tensor, scaling: float, chunk: Chunk) -> torch.Tensor:
    """[H, C, D] of the chunk's rows. Scaled before the product, which in fp16 could overflow else; it is also
    the smaller tensor."""
    return query_BHLD[chunk.batch_row][:, chunk.rows_C] * scaling


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# No mask function goes with it: without one transformers builds no mask, and does not look for packed
# sequences in the positions either, for which the host would wait for the device.
AttentionInterface.register(ATTENTION_NAME, attention)
