"""What a method took at a shape, and the rows of the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.measure import Memory


@dataclass
class Result:
    """One method at one shape. ``seconds`` by round, from the first one; bytes are above the weights."""

    shape: str
    lengths: tuple[int, ...]
    method: str
    fits: bool = True
    predicted_peak: int | None = None  # bytes, at most; from shapes with fewer samples
    memory: Memory | None = None
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    padding: float = 0.0  # share of the positions that are computed
    micro_batches: int = 1
    predicted: float | None = None  # seconds, by the plan's roofline; of the product's packed step

    @property
    def out_of_time(self) -> bool:
        """The benchmark's time was over before a step of this method was timed."""
        return self.fits and not self.seconds


def time_ratio(result: Result, base: Result) -> float:
    """Median over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(result.seconds, base.seconds, strict=False))


def table_head(peak: float | None) -> list[str]:
    """``peak``: FLOP/s of the chip, if known."""
    head = ["L x samples", "method", "padding", "seconds", "spread", "x floor"]
    head += ["kept MiB", "x floor", "peak MiB", "x floor", "x predicted"]
    return head + (["of peak"] if peak is not None else [])


def table_rows(results: Sequence[Result], peak: float | None) -> list[list[str]]:
    floors = {result.shape: result for result in results if result.method == "floor"}
    return [_row(result, floors.get(result.shape), peak) for result in results]


def _row(result: Result, base: Result | None, peak: float | None) -> list[str]:
    names = [result.shape, result.method, f"{result.padding:.0%}"]
    if not result.fits or result.out_of_time or result.memory is None:
        about = "" if result.predicted_peak is None else f"about {result.predicted_peak / 2**20:.0f}"
        return [
            *names,
            "no time left" if result.out_of_time else "does not fit",
            "",
            "",
            "",
            "",
            about,
            "",
            "",
            *([""] if peak is not None else []),
        ]
    median, ratios = statistics.median(result.seconds), ["", "", ""]
    if base is not None and base.memory is not None and base.seconds:
        kept, highest = result.memory.kept / base.memory.kept, result.memory.peak / base.memory.peak
        ratios = [f"{ratio:.2f}" for ratio in (time_ratio(result, base), kept, highest)]
    return [
        *names,
        f"{median:.3f}",
        f"{min(result.seconds):.3f} to {max(result.seconds):.3f}",
        ratios[0],
        f"{result.memory.kept / 2**20:.0f}",
        ratios[1],
        f"{result.memory.peak / 2**20:.0f}",
        ratios[2],
        "" if result.predicted is None else f"{median / result.predicted:.2f}",
        *([] if peak is None else [f"{result.flops / median / peak:.0%}"]),
    ]
