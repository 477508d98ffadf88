"""``python -m benchmarks.whole``: from ``alignkd launch`` to done, against the floor's steps with an AdamW.

For every shape and number of ranks, a whole run through the command line on this machine's CPUs (loader,
DeepSpeed, optimizer, metrics, saves, export) and the floor's steps in as many processes take turns. A ratio
is the median over such pairs of the ratio of their median steps. The first cross-entropies must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from alignkd.data.index_cache import CACHE_VARIABLE
from benchmarks import report
from benchmarks.models import PAIRS
from benchmarks.whole.inputs import write_configuration, write_models
from benchmarks.whole.parts import FloorRun, Measured, ProductRun, part_table, read_run, whole_table
from launcher.backends.ranks import free_port, rank_environments, start_ranks

# What start and saves slow down stays below the median step, of runs that take about as long.
TOKENS = 8_000  # of a run and rank, by default, but at least
FEWEST_STEPS = 10
TOLERANCE = 1e-4  # relative, of the cross-entropy: sums of thousands of positions in another order


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole", description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 1200, 2048])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4], help="of a rank's micro-batch")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a micro-batch, at most")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="of a run, the first not counted; by default by length")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a run and the floor")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the configuration"
    )
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    measured = report.facts(arguments)
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="alignkd-whole-") as name:
        folder = Path(name)
        os.environ[CACHE_VARIABLE] = str(folder / "cache")
        write_models(folder / "models", PAIRS[options.pair])
        for ranks in options.ranks:
            for samples in options.samples:
                for length in options.lengths:
                    if samples > 1 and length * samples > options.longest:
                        continue
                    result = Measured(length, samples, ranks)
                    _measure(result, folder, options)
                    results.append(result)
                    print(*whole_table([result])[1][0], sep=" | ", flush=True)
                    if options.publish:
                        report.publish("whole", measured, body(results), [asdict(one) for one in results])
    print(report.section("whole", measured, body(results)))


def body(results: Sequence[Measured]) -> str:
    return f"{report.table(*whole_table(results))}\n\nBy part:\n\n{report.table(*part_table(results))}"


def _measure(result: Measured, folder: Path, options: argparse.Namespace) -> None:
    place = folder / f"{result.length}-{result.samples}-{result.ranks}"
    steps = options.steps
    if steps is None:
        steps = max(TOKENS // (result.length * result.samples), FEWEST_STEPS)
    config = write_configuration(place, folder / "models", result.length, result.samples, result.ranks, steps)
    for number in range(options.repeats):
        run, whole = launch(config, f"run{number}", result.ranks, options.set)
        result.runs.append(read_run(run, whole))
        result.floors.append(run_floor(run, place / f"floor{number}.json", result.ranks))
        check(result.runs[-1], result.floors[-1])


def launch(config: Path, name: str, ranks: int, settings: Sequence[str]) -> tuple[Path, float]:
    """The folder of a run that is done, and the seconds that the command took."""
    command = [sys.executable, "-m", "launcher.cli", "launch", config.name, "--name", name, "--cpu"]
    command += ["--backend", "local", "--nodes", "1", "--gpus-per-node", str(ranks)]
    for setting in settings:
        command += ["--set", setting]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=config.parent, env=_environment(), capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"alignkd launch ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return config.parent / "runs" / name, whole


def _environment() -> dict[str, str]:
    """Processes start in other folders: they find this checkout by its path."""
    path = [str(report.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run_floor(run: Path, out: Path, ranks: int) -> FloorRun:
    environments = rank_environments(1, ranks, free_port(), "cpu", [], _environment())
    logs = out.with_suffix(".logs")
    command = [sys.executable, "-m", "benchmarks.whole.floor", str(run), str(out)]
    group = start_ranks(command, environments, logs)
    while group.running and not any(group.codes.values()):
        group.next_exit(timeout=1.0)
    group.kill()
    if any(group.codes.values()):
        raise SystemExit("\n".join(log.read_text()[-2000:] for log in sorted(logs.iterdir())))
    return FloorRun(**json.loads(out.read_text(encoding="utf-8")))


def check(run: ProductRun, floor: FloorRun) -> None:
    """Raises SystemExit unless both have trained on the same samples from the same weights."""
    if abs(run.cross_entropy - floor.cross_entropy) > TOLERANCE * floor.cross_entropy:
        both = f"{run.cross_entropy} in the run, {floor.cross_entropy} in the floor"
        raise SystemExit(f"the first cross-entropy is {both}: they do not train on the same")


if __name__ == "__main__":
    main(sys.argv[1:])
