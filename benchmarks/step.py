"""One distillation step, several ways side by side: ``python -m benchmarks.step``.

All methods (see :mod:`benchmarks.methods`) share the models, the batch and the process, and take turns; a
ratio is the median over the rounds of the ratio within a round. Before anything is timed, the losses that
methods have in common must agree. What does not fit into memory is a result.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from alignkd.models.loading import DTYPES
from benchmarks import chips, report
from benchmarks.batches import Samples, random_samples
from benchmarks.measure import Memory, seconds, step_memory
from benchmarks.methods import METHODS, Losses, Setting, new_setting
from benchmarks.models import PAIRS, random_pair
from benchmarks.plots import plot_steps

MIXED = [260, 400, 700, 1600]  # lengths of a batch as a shuffled file gives it
PRINCIPAL = ("floor", "ours", "stand-in")
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
# Relative: sums of thousands of positions in another order, or in another precision.
FOCUS_TOLERANCE = 0.02
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}


@dataclass
class Result:
    """One method at one shape. ``seconds`` by round; bytes are above the weights."""

    shape: str
    method: str
    fits: bool = True
    memory: Memory | None = None
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0


def measure_shape(
    setting: Setting, samples: Samples, results: list[Result], budget: float, precision: str
) -> None:
    """Fills ``results`` (one per method, the floor first) in ``budget`` seconds or :data:`LEAST_ROUNDS`."""
    tensors = [
        value
        for batch in (samples.padded, samples.packed)
        for value in vars(batch).values()
        if isinstance(value, torch.Tensor)
    ]
    reference: Losses = {}
    for result in results:
        memory = _fitting(setting, samples, result, lambda step: _losses_and_memory(setting, tensors, step))
        if memory is not None:
            losses, result.memory = memory
            _check(result.method, losses, reference, TOLERANCES[precision])
    started = time.monotonic()
    for number in range(MOST_ROUNDS):
        # The order turns, so that no method always follows the one that leaves the caches cold.
        for result in results[number % len(results) :] + results[: number % len(results)]:
            taken = _fitting(setting, samples, result, lambda step: seconds(step, setting.device))
            if taken is not None:
                result.seconds.append(taken)
        if number + 1 >= LEAST_ROUNDS and time.monotonic() - started > budget:
            return


def _losses_and_memory(setting: Setting, tensors: list[torch.Tensor], step: Any) -> tuple[Losses, Memory]:
    losses: Losses = {}
    memory = step_memory(
        lambda: losses.update(step()), setting.edge, setting.known() + tensors, setting.device
    )
    return losses, memory


def _fitting(setting: Setting, samples: Samples, result: Result, measure: Any) -> Any:
    """``measure`` of a step of this method; None, and ``fits`` false, when memory does not suffice."""
    if not result.fits:
        return None
    method = METHODS[result.method]
    try:
        return measure(lambda: method(setting, samples))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        result.fits = False
        return None
    finally:
        setting.forget_gradients()
        gc.collect()
        if setting.device.type == "cuda" and not result.fits:
            torch.cuda.empty_cache()


def _check(method: str, losses: Losses, reference: Losses, tolerance: float) -> None:
    for name, value in losses.items():
        expected = reference.setdefault(name, value)
        # Which tokens are in focus hangs on ties of random weights: other kernels may choose another one.
        allowed = max(tolerance, FOCUS_TOLERANCE) if name == "vision_focus" else tolerance
        if abs(value - expected) > allowed * max(abs(expected), 1e-3):
            raise SystemExit(f"{method}: {name} is {value}, another method has {expected}")


def rows(results: list[Result], peak: float | None) -> list[list[str]]:
    """Of the table; ``peak``: FLOP/s of the chip, if known."""
    lines = []
    floors = {result.shape: result for result in results if result.method == "floor"}
    for result in results:
        base, shape = floors[result.shape], [result.shape, result.method]
        if not result.fits or result.memory is None or not base.fits or base.memory is None:
            lines.append([*shape, *["does not fit"] * (7 + (peak is not None))])
            continue
        median = statistics.median(result.seconds)
        share = [] if peak is None else [f"{result.flops / median / peak:.0%}"]
        lines.append(
            [
                *shape,
                f"{median:.3f}",
                f"{min(result.seconds):.3f} to {max(result.seconds):.3f}",
                f"{time_ratio(result, base):.2f}",
                f"{result.memory.kept / 2**20:.0f}",
                f"{result.memory.kept / base.memory.kept:.2f}",
                f"{result.memory.peak / 2**20:.0f}",
                f"{result.memory.peak / base.memory.peak:.2f}",
                *share,
            ]
        )
    return lines


def time_ratio(result: Result, base: Result) -> float:
    return statistics.median(a / b for a, b in zip(result.seconds, base.seconds, strict=True))


def main(arguments: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="published" if on_gpu else "small")
    parser.add_argument("--precision", choices=TOLERANCES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 1200, 2048])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 8] if on_gpu else [1, 4])
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True, help="a mixed batch too"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--everything", action="store_true", help="every method at every shape, on a CPU too")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds per shape after the first rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(options.threads)
    measured = report.facts(arguments)
    if not on_gpu:
        _limit_memory()
    pair = PAIRS[options.pair]
    teacher, student = random_pair(pair, DTYPES[options.precision], device)
    if on_gpu:
        student.enable_gradient_checkpointing()
    setting = new_setting(teacher, student, device)
    methods = ["floor", *(method for method in options.methods if method != "floor")]
    results: list[Result] = []
    shapes = {
        f"{length} x {count}": [length] * count for count in options.samples for length in options.lengths
    }
    if options.mixed:
        shapes["mixed x 4"] = MIXED
    everything = on_gpu or options.everything
    for shape, lengths in shapes.items():
        samples = random_samples(lengths, device)
        flops = chips.step_flops(pair, samples.padded)
        # On a CPU every device for several equal samples would take an hour and say what one sample says.
        shown = methods if everything or len(set(lengths)) == len(lengths) else PRINCIPAL
        of_shape = [Result(shape, method, flops=flops) for method in methods if method in shown]
        measure_shape(setting, samples, of_shape, options.budget, options.precision)
        results += of_shape
        print(*(" | ".join(row) for row in rows(of_shape, None)), sep="\n", flush=True)
    peak = chips.bf16_peak(torch.cuda.get_device_name()) if on_gpu else None
    head = [
        "L x samples",
        "method",
        "seconds",
        "spread",
        "x floor",
        "kept MiB",
        "x floor",
        "peak MiB",
        "x floor",
    ]
    body = "\n".join(
        [
            f"Parameters: teacher {_millions(teacher)} M, student {_millions(student)} M, "
            f"{options.precision}, gradient checkpointing {'on' if on_gpu else 'off'}.\n",
            report.table(head + (["of peak"] if peak is not None else []), rows(results, peak)),
        ]
    )
    if on_gpu and peak is None:
        body += f"\n\nThe bf16 peak of {torch.cuda.get_device_name()} is not known here."
    name = "step-gpu" if on_gpu else "step-cpu"
    print(report.section(name, measured, body))
    if options.publish:
        plot_steps([asdict(result) for result in results], report.FOLDER / f"{name}.svg")
        report.publish(
            name, measured, body + f"\n\n![{name}](performance/{name}.svg)", list(map(asdict, results))
        )


def _limit_memory() -> None:
    """What does not fit then fails, before the kernel ends the process."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            limit = int(int(line.split()[1]) * 1024 * 0.9)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}"


if __name__ == "__main__":
    main(sys.argv[1:])
