"""``python -m tests.hangs``: stop a random rank of a run at a random moment, again and again.

Each time the watch must end the attempt and name that rank; resumed, the run must end with the rows and the
weights of an undisturbed run. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from alignkd.errors import EXIT_HUNG
from alignkd.run_folder.heartbeat import read_beat
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import read_history
from launcher.run.logs import first_error
from tests.chaos.__main__ import LONGEST_START, alignkd, launch, write_configuration
from tests.chaos.oracle import differing_rows, rows, weights_hash
from tests.checkpoint.faulty_storage import children

STEPS = 30
HANG_SECONDS = 15


@dataclass
class Report:
    stops: int = 0
    missed: int = 0  # the run was over before
    phases: dict[str, int] = field(default_factory=dict)  # of the stopped rank's last heartbeat
    seconds: list[float] = field(default_factory=list)  # from the stop to the end of the attempt
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        slowest = f"{max(self.seconds):.0f} s" if self.seconds else "-"
        places = ", ".join(f"{phase}: {count}" for phase, count in sorted(self.phases.items()))
        lines = [f"{self.stops} stops ({places}); {self.missed} missed; noticed after {slowest} at most"]
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def stop_at_random(run: Path, process: subprocess.Popen[bytes], rng: random.Random) -> int | None:
    """The rank that was stopped; None when the run was over before."""
    rank, in_start, seconds = rng.randrange(2), rng.random() < 0.3, rng.uniform(0.0, 8.0)
    deadline = time.monotonic() + LONGEST_START
    while len(children(process.pid)) < 2 or not (in_start or rows(run)):
        if process.poll() is not None or time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    time.sleep(seconds)
    ranks = sorted(children(process.pid))
    if len(ranks) != 2 or process.poll() is not None:
        return None
    os.kill(ranks[rank], signal.SIGSTOP)
    return rank


def check_hang(run: Path, rank: int, code: int, where: str, report: Report) -> None:
    last = read_history(run)[-1]
    if (code, last.reason, last.failed_rank) != (EXIT_HUNG, "hung", rank):
        report.problems.append(f"{where}: code {code}, reason {last.reason}, blamed rank {last.failed_rank}")
        return
    error = first_error(run, None)
    if error is None or f"rank {rank} on " not in error.lines[0]:
        report.problems.append(f"{where}: the log does not name the rank: {error}")
    beat = read_beat(run, 1 - rank)
    if beat is not None and beat.phase == "ended":
        return  # it did not wait: the rank was stopped as it exited
    if "most recent call first" not in RunPaths(run).log(1 - rank).read_text():
        report.problems.append(f"{where}: the rank that waited has written no stacks")


def one_run(run: Path, expected: Path, rng: random.Random, report: Report) -> None:
    process = alignkd(run, "resume", str(run))
    rank = stop_at_random(run, process, rng)
    started = time.monotonic()
    code = process.wait(timeout=LONGEST_START)
    if rank is None:
        report.missed += 1
    else:
        beat = read_beat(run, rank)
        phase = beat.phase if beat is not None else "not started"
        where = f"{run.name}, rank {rank} stopped in {phase}"
        report.stops += 1
        report.phases[phase] = report.phases.get(phase, 0) + 1
        report.seconds.append(time.monotonic() - started)
        check_hang(run, rank, code, where, report)
        print(f"{where}: ended with {code} after {report.seconds[-1]:.0f} s", flush=True)
        code = alignkd(run, "resume", str(run)).wait(timeout=2 * LONGEST_START)
    if code != 0:
        report.problems.append(f"{run.name}: the resumed run ended with {code}")
    elif differing_rows(run, expected) or weights_hash(run) != weights_hash(expected):
        report.problems.append(f"{run.name}: rows or weights differ from those of the undisturbed run")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hangs", description=__doc__)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="alignkd-hangs-"))
    print(f"seed {seed}; {options.stops} stops; folder {folder}", flush=True)
    started, report, rng = time.monotonic(), Report(), random.Random(seed)
    write_configuration(folder, STEPS)
    settings = ("--set", f"training.hang_seconds={HANG_SECONDS}")
    expected = launch(folder, "undisturbed", *settings)
    number = 0
    while report.stops < options.stops and number < 3 * options.stops:
        run = launch(folder, f"stopped-{(number := number + 1)}", "--dry-run", *settings)
        one_run(run, expected, rng, report)
    print(f"{report}\n{(time.monotonic() - started) / 60:.0f} minutes, seed {seed}")
    if report.problems or report.stops < options.stops:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
