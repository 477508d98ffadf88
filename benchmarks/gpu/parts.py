"""The parts in their order, by value: what a later one tells is worth less when the time runs out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks import report
from benchmarks.gpu.rows import Row

GRACE_SECONDS = 2.0
TAIL_LINES = 15

Status = Literal["done", "failed", "out of time", "not started"]


@dataclass(frozen=True)
class Part:
    """``name`` is a module of this package; ``share`` of the whole time, and what earlier parts left."""

    name: str
    title: str
    share: float


PARTS = (
    Part("ceilings", "What the chip can do, and attention at new lengths", 0.14),
    Part("steps", "One step against its floor", 0.28),
    Part("attention", "Attention within packed samples, forward and backward", 0.10),
    Part("layers", "Layers, eager and compiled", 0.20),
    Part("waits", "Where the host waits in a step", 0.12),
    Part("head", "The head with its losses, forward and backward", 0.07),
    Part("repeat", "The same step twice", 0.09),
)


@dataclass
class Outcome:
    """One part's rows: all of them when it is done, else those before it ended."""

    name: str
    title: str
    command: str
    status: Status = "not started"
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    log: str = ""  # the end of what it printed, if it failed


def part_command(part: Part, tiny: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.part", part.name, *(["--tiny"] if tiny else [])]


def allowed_seconds(parts: Sequence[Part], number: int, total: float, spent: float) -> float:
    """For part ``number`` of the chosen ones: until the shares up to its own are over."""
    until = sum(part.share for part in parts[: number + 1]) / sum(part.share for part in parts)
    return until * total - spent


def run_part(part: Part, command: Sequence[str], allowed: float, folder: Path) -> Outcome:
    """In a process of its own, which writes its rows into a file that it is given as the last argument.

    At the end of the time the process is ended, with all that it has started: compilers, for one.
    """
    shown = " ".join(["python", *command[1:]])
    outcome = Outcome(part.name, part.title, shown)
    if allowed <= GRACE_SECONDS:
        return outcome
    rows, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(rows)],
            cwd=report.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(allowed - GRACE_SECONDS)
            outcome.status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome.status = "out of time"
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - started
    if rows.exists():
        # A process that was ended may have written half a line.
        lines = rows.read_text(encoding="utf-8").split("\n")[:-1]
        outcome.rows = [json.loads(line) for line in lines]
    if outcome.status == "failed":
        outcome.log = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process group, whose leader may have ended before its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
