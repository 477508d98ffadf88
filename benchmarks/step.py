"""One distillation step, several ways side by side: ``python -m benchmarks.step``.

All methods (see :mod:`benchmarks.methods`) share the models, the samples and the process, and take turns; a
ratio is the median over rounds of the ratio within a round. Before anything is timed, the losses that methods
have in common must agree. Not fitting into memory is a result. With ``--publish`` the results are written
after every shape, so that an interrupted run loses nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from alignkd.data.batch import Batch
from alignkd.models.building import DTYPES
from benchmarks import chips, family_step, predicted, report
from benchmarks.batches import Shape, random_window
from benchmarks.families import BUILDERS as FAMILIES
from benchmarks.measure import Memory, seconds, step_memory
from benchmarks.memory import limit_memory, predicted_peak, usable_memory
from benchmarks.methods import METHODS
from benchmarks.models import PAIRS, random_pair
from benchmarks.results import Result, table_head, table_rows
from benchmarks.setting import CacheForm, Losses, Setting, Sums, as_from_cache, new_setting, padding_share
from benchmarks.shapes import PRINCIPAL, methods_of, shapes_of

# Rounds of a method; the principal ones continue until the time for a shape is up. The stand-in is slow, and
# its ratio large enough.
LEAST_ROUNDS, STAND_IN_ROUNDS, MOST_ROUNDS = 3, 2, 15
# Relative: sums of thousands of positions in another order, or in another precision.
FOCUS_TOLERANCE = 0.02
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
# Of docs/performance.md, by pair and whether on a GPU.
SECTIONS = {
    ("small", False): "step-cpu",
    ("quarter", False): "step-quarter",
    ("published", True): "step-gpu",
}


def measure_shape(
    setting: Setting,
    shape: Shape,
    results: list[Result],
    budget: float,
    precision: str,
    deadline: float = math.inf,
) -> None:
    """Fills ``results``, one per method, the floor first: :data:`LEAST_ROUNDS`, and more until ``budget``
    seconds are over. No step begins after ``deadline``, by the monotonic clock."""
    windows: dict[tuple[bool, bool, CacheForm | None], list[Batch]] = {}
    reference: Losses = {}
    for result in results:
        if time.monotonic() > deadline:
            return
        method = METHODS[result.method]
        layout = (method.packing, method.token_budget, method.cached)
        if layout not in windows:
            windows[layout] = random_window(shape, *layout[:2], setting.device)
            if method.cached is not None:
                windows[layout] = as_from_cache(setting.teacher, windows[layout], method.cached)
        window = windows[layout]
        result.padding, result.micro_batches = padding_share(window), len(window)
        memory = _fitting(setting, window, result, partial(_losses_and_memory, setting, window))
        if memory is not None:
            losses, result.memory = memory
            _check(result.method, losses, reference, TOLERANCES[precision])
    started = time.monotonic()
    for number in range(MOST_ROUNDS):
        # The order rotates, so that no method always follows the one that leaves the caches cold.
        for result in results[number % len(results) :] + results[: number % len(results)]:
            if number >= _rounds(result.method):
                continue
            if time.monotonic() > deadline:
                return
            method = METHODS[result.method]
            window = windows[method.packing, method.token_budget, method.cached]
            taken = _fitting(setting, window, result, lambda step: seconds(step, setting.device))
            if taken is not None:
                result.seconds.append(taken)
        if number + 1 >= LEAST_ROUNDS and time.monotonic() - started > budget:
            return


def _rounds(method: str) -> int:
    if method in PRINCIPAL:
        return MOST_ROUNDS
    return STAND_IN_ROUNDS if method == "stand-in" else LEAST_ROUNDS


def _losses_and_memory(
    setting: Setting, window: list[Batch], step: Callable[[], Sums]
) -> tuple[Losses, Memory]:
    sums: Sums = {}
    memory = step_memory(lambda: sums.update(step()), setting.edge, setting.device)
    return setting.means(sums, window), memory


def _fitting(setting: Setting, window: list[Batch], result: Result, measure: Any) -> Any:
    """``measure`` of a step of this method; None, and ``fits`` false, when it runs out of memory."""
    if not result.fits:
        return None
    method = METHODS[result.method]
    try:
        return measure(lambda: method.step(setting, window))
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
        # Random weights nearly tie in the focus score: other kernels may choose another token.
        allowed = max(tolerance, FOCUS_TOLERANCE) if name == "vision_focus" else tolerance
        if abs(value - expected) > allowed * max(abs(expected), 1e-3):
            raise SystemExit(f"{method}: {name} is {value}, another method has {expected}")


def main(arguments: list[str]) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, help="as a rule published on a GPU, small on a CPU")
    parser.add_argument("--precision", choices=TOLERANCES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 1200, 2048])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 8] if on_gpu else [1, 4])
    parser.add_argument(
        "--mixed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure a batch of mixed lengths, and an accumulation window",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS))
    parser.add_argument("--everything", action="store_true", help="all variants at all shapes, on a CPU too")
    parser.add_argument(
        "--budget", type=float, default=40.0, help="least seconds per shape; three rounds in any case"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0 if on_gpu else 30.0, help="start no step after so many minutes"
    )
    # Threads that wait for one another make noise; one thread leaves the other cores to other processes.
    parser.add_argument("--threads", type=int, default=torch.get_num_threads() if on_gpu else 1)
    parser.add_argument(
        "--families",
        nargs="+",
        choices=FAMILIES,
        help="measure small models of these instead, against a floor",
    )
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    if options.families and (options.pair or options.publish):
        parser.error(
            "--families has models of its own, and its results are printed only: no --pair, no --publish"
        )
    pair = PAIRS[options.pair or ("published" if on_gpu else "small")]
    if options.publish and (pair.name, on_gpu) not in SECTIONS:
        here = " or ".join(name for name, gpu in SECTIONS if gpu == on_gpu)
        parser.error(f"docs/ has no section for the pair {pair.name} on this device; with --publish: {here}")
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(options.threads)
    measured = report.facts(arguments)
    if options.families:
        shapes = shapes_of(options.lengths, options.samples, mixed=False)
        rows = family_step.rows_of(
            options.families, shapes, options.precision, device, options.budget, deadline
        )
        print(report.section("step-families", measured, report.table(family_step.HEAD, rows)))
        return
    teacher, student = random_pair(pair, DTYPES[options.precision], device)
    if on_gpu:
        student.enable_gradient_checkpointing()
    else:
        limit_memory()
    setting = new_setting(teacher, student, device)
    usable = None if on_gpu else usable_memory()  # on a GPU running out of it is caught
    peak = chips.bf16_peak(torch.cuda.get_device_name()) if on_gpu else None
    chip = predicted.chip_of(device, DTYPES[options.precision])
    left = shapes_of(options.lengths, options.samples, options.mixed)
    results: list[Result] = []

    def body() -> str:
        lines = [
            f"Parameters: teacher {_millions(teacher)} M, student {_millions(student)} M, "
            f"{options.precision}, gradient checkpointing {'on' if on_gpu else 'off'}.\n",
            report.table(table_head(peak), table_rows(results, peak)),
            f"\n{predicted.describe(chip)}",
        ]
        if left:
            lines.append(f"\nThe run ended before {', '.join(shape.name for shape in left)}.")
        if on_gpu and peak is None:
            lines.append(f"\nThe bf16 peak of {torch.cuda.get_device_name()} is not known here.")
        return "\n".join(lines)

    while left and time.monotonic() < deadline:
        shape = left.pop(0)
        flops = sum(chips.step_flops(pair, batch) for batch in random_window(shape, False, False, device))
        shown = [name for name in methods_of(shape, on_gpu or options.everything) if name in options.methods]
        of_shape = [Result(shape.name, shape.lengths, name, flops=flops) for name in shown]
        for result in of_shape:
            if result.method == "ours":
                result.predicted = predicted.predicted_seconds(teacher, student, shape, chip, on_gpu)
            result.predicted_peak = predicted_peak(result, results)
            if usable is not None and (result.predicted_peak or 0) > usable:
                result.fits = False
        measure_shape(setting, shape, of_shape, options.budget, options.precision, deadline)
        results += of_shape
        print(*(" | ".join(row) for row in table_rows(of_shape, None)), sep="\n", flush=True)
        if options.publish:
            _publish(SECTIONS[pair.name, on_gpu], measured, body(), results)
    print(report.section("step", measured, body()))


def _publish(name: str, measured: dict[str, Any], body: str, results: list[Result]) -> None:
    from benchmarks.plots import plot_steps  # in an optional dependency that nothing else here needs

    picture = f"![time and kept memory over the floor](performance/{name}.svg)"
    report.publish(name, measured, f"{body}\n\n{picture}", [asdict(result) for result in results])
    plot_steps(results, report.FOLDER / f"{name}.svg")


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}"


if __name__ == "__main__":
    main(sys.argv[1:])
