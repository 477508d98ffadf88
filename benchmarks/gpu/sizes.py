"""What the parts measure: shapes for a GPU, and tiny ones with which a CPU runs the same code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.batches import Shape
from benchmarks.models import PUBLISHED, SMALL, Decoder, Pair


@dataclass(frozen=True)
class Sizes:
    device: torch.device
    dtype: torch.dtype
    pair: Pair  # for whole steps
    shallow: Pair  # the same widths, few layers
    checkpointing: bool
    matrix: int  # rows and columns of a product
    copied_bytes: int
    new_lengths: int  # sequences, each of a length that no kernel has seen
    shapes: tuple[Shape, ...]  # of whole steps, the mixed one last
    packed_tokens: tuple[int, ...]  # in a packed row
    shortest: int  # sample of a packed row
    longest: int
    packings: int
    positions: int  # of the head
    chunks: tuple[int, ...]  # positions per chunk
    compiler: str  # back end of torch.compile
    rounds: int


def _shallow(pair: Pair, layers: int) -> Pair:
    def cut(decoder: Decoder) -> Decoder:
        return Decoder(decoder.width, decoder.feed_forward, layers, decoder.heads)

    return Pair(f"{pair.name}, {layers} layers", cut(pair.teacher), cut(pair.student), pair.tower)


# 16 samples of a shuffled file, as in the published data: most of some hundred tokens, few long ones.
_MIXED = (210, 230, 260, 290, 310, 340, 380, 420, 470, 520, 600, 690, 800, 960, 1250, 1700)
TINY_PAIR = Pair(
    "tiny",
    Decoder(64, 128, 2, 4),
    Decoder(32, 64, 2, 2),
    {**SMALL.tower, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
)


def full_sizes() -> Sizes:
    return Sizes(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        pair=PUBLISHED,
        shallow=_shallow(PUBLISHED, 4),
        checkpointing=True,
        matrix=8192,
        copied_bytes=2**31,
        new_lengths=20,
        shapes=(Shape("2048 x 4", (2048,) * 4), Shape("mixed x 16", _MIXED)),
        packed_tokens=(8192, 16384),
        shortest=200,
        longest=600,
        packings=5,
        positions=4096,
        chunks=(512, 2048),
        compiler="inductor",
        rounds=5,
    )


def tiny_sizes() -> Sizes:
    return Sizes(
        device=torch.device("cpu"),
        dtype=torch.float32,
        pair=TINY_PAIR,
        shallow=TINY_PAIR,
        checkpointing=False,
        matrix=64,
        copied_bytes=2**16,
        new_lengths=2,
        shapes=(Shape("190 x 2", (190,) * 2), Shape("mixed x 2", (185, 200))),
        packed_tokens=(96,),
        shortest=10,
        longest=40,
        packings=3,
        positions=24,
        chunks=(8, 16),
        compiler="eager",
        rounds=1,
    )
