"""``python -m tests.chaos``: kill a training run again and again at random, resume it as a user would, and
compare it with an undisturbed run.

In between, other things happen to it (``tests.chaos.accidents``). Exits with 1 when a committed checkpoint
was lost, a resume took the wrong one or went on without one, or anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from alignkd.run_folder.paths import RunPaths
from tests import tiny
from tests.chaos.accidents import (
    LONGEST_START,
    alignkd,
    between_starts,
    can_fill_a_disk,
    start_on_a_filling_disk,
)
from tests.chaos.oracle import Left, differing_rows, look, rows, weights_hash
from tests.chaos.plan import ACCIDENTS, BETWEEN_STARTS, DISK, DISTURBED, START, Kill, kills
from tests.chaos.report import Report
from tests.checkpoint.faulty_storage import children
from tests.checkpoint.killing import start_program, start_with_kill, wait_until_gone

EVERY = 2  # steps between two checkpoints


def write_configuration(folder: Path, steps: int) -> None:
    records = [tiny.CASES[name]["record"] for name in ("v1", "rounds", "text")] * 16
    (folder / "data.json").write_text(json.dumps(records))
    document = {
        "model": {"teacher": str(tiny.TEACHER), "student": str(tiny.STUDENT)},
        "data": {"sources": [{"file": "data.json", "image_folder": str(tiny.FOLDER)}], "workers": 1},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "epochs": 4,
            "max_steps": steps,
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every": EVERY, "keep_last": 1},
    }
    (folder / "alignkd.yaml").write_text(yaml.safe_dump(document))


def launch(folder: Path, name: str, *options: str) -> Path:
    words = ("launch", "--nodes", "2", "--backend", "local", "--cpu", "--name", name, *options)
    code = alignkd(folder, *words).wait(timeout=900)
    if code != 0:
        raise SystemExit(f"alignkd launch ended with {code}; see {folder / 'launcher.log'}")
    return folder / "runs" / name


def start_and_kill(run: Path, kill: Kill, committed: int, last_step: int) -> int:
    """Returns the launcher's exit code."""
    if kill.phase == DISK:
        return start_on_a_filling_disk(run, kill.amount)
    if kill.in_save:
        step = min(committed + kill.save * EVERY, last_step)
        process = start_with_kill(run, kill.phase, kill.rank, kill.victim, step)
        return process.wait(timeout=LONGEST_START)
    before = len(rows(run))
    if kill.phase in DISTURBED:
        process = start_program(run, "tests.chaos.rank", kill.phase, str(kill.rank), str(kill.amount))
    else:
        process = alignkd(run, "resume", str(run))
    deadline = time.monotonic() + LONGEST_START
    fresh = False
    while not fresh and kill.phase != START and process.poll() is None:
        # The rows beyond the checkpoint are cut first: a new one is one that was not there then.
        now = len(rows(run))
        fresh, before = now > before, now
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run}: no step in {LONGEST_START:.0f} s")
        time.sleep(0.05)
    time.sleep(kill.seconds)
    ranks = sorted(children(process.pid))
    victims = {
        "parent": [process.pid],
        "all": ranks,
        "rank": ranks[kill.rank : kill.rank + 1] or ranks,
    }[kill.victim]
    for victim in victims or [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return process.wait(timeout=LONGEST_START)


def judge(report: Report, before: Left | None, after: Left, where: str) -> None:
    """The start that left ``after`` resumed from what ``before`` had."""
    had = before.committed if before is not None else 0
    if after.passed_over:
        report.lost_checkpoints.append(f"{where}: passed over {'; '.join(after.passed_over)}")
    if after.resumed is not None and after.resumed != had:
        report.wrong_resumes.append(f"{where}: resumed at {after.resumed}, step {had} was committed")
    if max(after.promised, had) > after.committed:
        report.lost_checkpoints.append(
            f"{where}: step {max(after.promised, had)} was saved, {after.committed} is the newest"
        )


def compare(report: Report, run: Path, expected: Path, where: str) -> None:
    report.finished_runs += 1
    report.differing += [f"{where}: row of step {step}" for step in differing_rows(run, expected)]
    if weights_hash(run) != weights_hash(expected):
        report.differing.append(f"{where}: the exported weights")


def one_run(run: Path, plan: Iterator[Kill], most: int, expected: Path, report: Report) -> None:
    """Kill and resume one run until it has ended."""
    last_step = len(rows(expected))
    left: Left | None = None
    while True:
        kill = next(plan) if len(report.kills) < most else None
        if kill is not None and kill.phase in ACCIDENTS and (left is None or not left.committed):
            continue  # there is nothing yet that could be lost
        log = run / "logs" / "rank-0.log"
        offset = log.stat().st_size if log.exists() else 0
        where = f"{run.name}, start after {len(report.kills)} kills"
        if kill is not None and kill.phase in BETWEEN_STARTS:
            between_starts(run, kill.phase, kill.seconds, report, where)
            print(f"          {kill.phase}", flush=True)
            continue
        RunPaths(run).progress.unlink(missing_ok=True)
        if kill is None:
            code = alignkd(run, "resume", str(run)).wait(timeout=3 * LONGEST_START)
        else:
            code = start_and_kill(run, kill, 0 if left is None else left.committed, last_step)
        wait_until_gone(run)
        after = look(run, offset)
        judge(report, left, after, where)
        if code == 0:
            report.missed += kill is not None
            compare(report, run, expected, run.name)
            shutil.rmtree(run)
            return
        if kill is None:
            raise SystemExit(
                f"{where}: ended with {code} though nobody killed it; see {run / 'launcher.log'}"
            )
        if code not in (-signal.SIGKILL, 128 + signal.SIGKILL, 1):
            raise SystemExit(f"{where}: ended with {code}; see {run}")
        left = after
        if kill.phase == DISK:
            report.accidents[DISK] += 1
            print(f"          {DISK}, committed {after.committed:2}", flush=True)
            continue
        report.kills.append(kill)
        report.lost_steps.append(after.computed - after.committed)
        print(
            f"kill {len(report.kills):3}: {kill.victim:6} at {kill.phase:11} ({kill.seconds:.1f} s) "
            f"step {after.computed:2}, committed {after.committed:2}, lost {report.lost_steps[-1]}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--steps", type=int, default=40, help="length of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of its configuration"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    folder = Path(tempfile.mkdtemp(prefix="alignkd-chaos-"))
    print(f"seed {seed}; {options.kills} kills; folder {folder}", flush=True)
    started, report = time.monotonic(), Report()
    write_configuration(folder, options.steps)
    settings = [word for setting in options.set for word in ("--set", setting)]
    expected = launch(folder, "undisturbed", *settings)
    can_fill = can_fill_a_disk()
    if not can_fill:
        print("no tmpfs may be mounted here: no disk fills")
    plan, number = (kill for kill in kills(seed) if can_fill or kill.phase != DISK), 0
    while len(report.kills) < options.kills:
        run = launch(folder, f"killed-{(number := number + 1)}", "--dry-run", *settings)
        one_run(run, plan, options.kills, expected, report)
    print("\n" + report.table(seed, time.monotonic() - started))
    if report.ok and not options.keep:
        shutil.rmtree(folder)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
