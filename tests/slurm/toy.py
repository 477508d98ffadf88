"""A rank that trains nothing but keeps the contract: files, signals, exit codes. ``toy.py RUN``, no torch.

``RUN/toy.json`` says what it does: ``steps``, ``seconds`` per step, ``every`` (steps between checkpoints),
``failures``: a list of {"attempt", "rank", "step", "code"}, where a negative code is a signal to itself, and
``hold``: a step per attempt from which it goes no further until a signal comes (0 or none: it does not wait),
or such a list for each name of a run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

RUN = Path(sys.argv[1])
RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ.get("ALIGNKD_ATTEMPT", "1"))
LEAVE = RUN / f"toy-leave-{ATTEMPT}"  # the toy's barrier: written by rank 0 when all may leave
HERE = f"toy-here-{ATTEMPT}-"  # and the rank: it has begun, and takes signals
DEAD = RUN / f"toy-dead-{ATTEMPT}"  # a rank has failed: the others cannot save without it
received: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda got, _: received.append(got))
if (RUN / "stop").exists():  # asked for before the handlers were there
    words = (RUN / "stop").read_text().split()
    received.append(signal.SIGUSR1 if "USR1" in words else signal.SIGTERM)


def replace(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def report(phase: str, step: int, total: int) -> None:
    facts = {"phase": phase, "step": step, "total_steps": total, "loss": 9.0 - step / total}
    replace(RUN / "progress.json", {**facts, "samples_per_second": 4.0, "updated": time.time()})


def save(step: int) -> None:
    folder = RUN / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMMITTED").touch()


def finish(code: int, step: int, total: int) -> None:
    status = "done" if code == 0 else "stopped"
    if code == 0:
        (RUN / "student").mkdir(exist_ok=True)
    replace(RUN / "result.json", {"status": status, "step": step, "total_steps": total, "seconds": 1.0})
    report(status, step, total)
    LEAVE.write_text(str(code))


def fail_if_told(failures: list[dict[str, int]], step: int) -> None:
    for entry in failures:
        if (entry["attempt"], entry["rank"], entry["step"]) == (ATTEMPT, RANK, step):
            print(f"out of cheese at step {step}", file=sys.stderr, flush=True)
            replace(DEAD, RANK)
            if entry["code"] < 0:
                os.kill(os.getpid(), -entry["code"])
            if entry["code"] == 2:
                print("alignkd: error: sample a: no such image", file=sys.stderr, flush=True)
            sys.exit(entry["code"])


def leave_when_one_is_dead() -> None:
    if DEAD.exists():
        print("connection closed by peer", file=sys.stderr, flush=True)
        blamed = RUN / "exits" / f"rank-{DEAD.read_text()}"
        while not blamed.exists():  # its end is what closes the connection
            time.sleep(0.02)
        sys.exit(1)


def wait_for_others() -> None:
    """Before the first step, as in a real run: a signal would kill a rank that has no handlers yet."""
    while len(list(RUN.glob(f"{HERE}*"))) < int(os.environ["WORLD_SIZE"]) - 1 and not received:
        leave_when_one_is_dead()
        time.sleep(0.02)


def first(plan: dict[str, Any]) -> int:
    total, every = plan["steps"], plan["every"]
    hold = plan["hold"].get(RUN.name, []) if isinstance(plan["hold"], dict) else plan["hold"]
    waits = {step for attempt, step in enumerate(hold, start=1) if attempt == ATTEMPT and step}
    # Where another rank fails, this one comes no further, as in a real step.
    waits |= {fail["step"] for fail in plan["failures"] if fail["attempt"] == ATTEMPT and fail["rank"] != 0}
    saved = [int(p.parent.name[5:]) for p in (RUN / "checkpoints").glob("step-*/COMMITTED")]
    step = max(saved, default=0)
    print(
        f"rank 0 of {os.environ['WORLD_SIZE']} starts at step {step}, master {os.environ['MASTER_PORT']}",
        flush=True,
    )
    metrics = RUN / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(rows[:step]))
    wait_for_others()
    report("training", step, total)
    while step < total and not received:
        fail_if_told(plan["failures"], step)
        if step in waits:
            leave_when_one_is_dead()
            time.sleep(0.02)
            continue
        time.sleep(plan["seconds"])
        step += 1
        loss = 9.0 - step / total
        with metrics.open("a") as file:
            row = {"step": step, "loss": loss, "step_seconds": plan["seconds"]}
            file.write(json.dumps(row) + "\n")
        report("training", step, total)
        if step % every == 0:
            save(step)
    leave_when_one_is_dead()
    save(step)
    code = 0 if step == total else 86 if signal.SIGTERM in received else 85
    finish(code, step, total)
    return code


def other(plan: dict[str, Any]) -> int:
    (RUN / f"{HERE}{RANK}").touch()
    while not LEAVE.exists():
        leave_when_one_is_dead()
        steps = (
            len((RUN / "metrics.jsonl").read_text().splitlines()) if (RUN / "metrics.jsonl").exists() else 0
        )
        fail_if_told(plan["failures"], steps)
        time.sleep(0.02)
    return int(LEAVE.read_text() or 0)


print(f"sees GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
PLAN_FILE = RUN / "toy.json"
PLAN = json.loads((PLAN_FILE if PLAN_FILE.exists() else RUN.parent / "toy.json").read_text())
sys.exit(first(PLAN) if RANK == 0 else other(PLAN))
