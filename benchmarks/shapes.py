"""Which samples and which methods ``benchmarks.step`` measures."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.batches import Shape
from benchmarks.methods import METHODS

MIXED = (240, 330, 560, 1200)  # lengths of a batch as a shuffled file gives it
PRINCIPAL = ("floor", "ours")
VARIANTS = ("ours, two towers", "ours, head not fused", "ours, attention term not fused")
LAYOUTS = ("ours, padded", "ours, token budget", "ours, padded, token budget")
LOOKAHEAD = ("ours, look-ahead 1",)
CACHED = ("floor, cached", "cached", "cached, top-k")


def shapes_of(lengths: Sequence[int], samples: Sequence[int], mixed: bool) -> list[Shape]:
    """One sample first, since its memory predicts that of several. Then what needs several samples."""
    listed = [Shape(f"{length} x {count}", (length,) * count) for count in samples for length in lengths]
    if mixed:
        first = sum(len(shape.lengths) == 1 for shape in listed)
        each = min(lengths)
        listed[first:first] = [
            Shape(f"mixed x {len(MIXED)}", MIXED),
            Shape(f"{each} x 1, window of 4", (each,) * 4, accumulate=True),
        ]
    return listed


def methods_of(shape: Shape, everything: bool) -> list[str]:
    """The methods that make a difference at a shape. Every variant at every shape would take an hour on a CPU
    and show what one sample shows; ``everything`` includes them anyway."""
    shown = set(PRINCIPAL)
    if shape.accumulate:
        shown |= set(LOOKAHEAD)
    else:
        shown |= {"stand-in", *CACHED}
        if everything or len(shape.lengths) == 1:
            shown |= set(VARIANTS)
        if shape.mixed:
            shown |= set(LAYOUTS)
    return [name for name in METHODS if name in shown]
