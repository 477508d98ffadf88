"""``python -m tests.evaluate.full_size``: an evaluation of each task's real number of questions is killed
with SIGKILL, resumed, and compared byte by byte with one that was not.

A tiny random model answers questions about made-up pictures. ``--share 0.01`` takes a hundredth of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.evaluate.made_up import PUBLISHED, Maker, random_model
from tests.launcher.cli.command import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate at full size, killed once, and compare.")
    parser.add_argument("--share", type=float, default=1.0, help="share of each task's questions")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep all files here; default: a temporary folder")
    given = parser.parse_args()
    with _folder(given.folder) as folder:
        return compare(folder, given.share, given.ranks)


def compare(folder: Path, share: float, ranks: int) -> int:
    """Exit code 0 if the killed evaluation ends like the other."""
    if not (folder / "model").exists():
        started = time.monotonic()
        Maker(folder / "data", sizes(share)).make()
        random_model(folder / "model")
        print(f"made the data in {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    if evaluate(folder, "whole", ranks).wait() != 0:
        return 1
    seconds = time.monotonic() - started
    answers = {path.name: path.read_bytes() for path in sorted((folder / "whole" / "model").iterdir())}
    questions = sum(data.count(b"\n") for data in answers.values())
    rate = questions / seconds / ranks
    print(f"{questions:,} questions in {seconds:.0f} s, {rate:.1f} per second and core", flush=True)
    done = kill_halfway(folder, ranks, seconds)
    print(f"killed with {done:,} of {questions:,} answers on disk", flush=True)
    if evaluate(folder, "killed", ranks).wait() != 0:
        return 1
    resumed = {path.name: path.read_bytes() for path in sorted((folder / "killed" / "model").iterdir())}
    if not 0 < done < questions:
        print("the kill did not come between the first and the last answer: nothing was shown; raise --share")
        return 1
    equal = resumed == answers
    print("the resumed evaluation equals the one that was not killed" if equal else "THEY DIFFER")
    return 0 if equal else 1


def sizes(share: float) -> dict[str, int]:
    """Of every task; POPE has three splits, and MME pairs in 14 categories."""
    steps = {"pope": 3, "mme": 28}
    return {
        name: max(step, round(count * share / step) * step) if share < 1 else count
        for name, count in PUBLISHED.items()
        for step in [steps.get(name, 1)]
    }


def evaluate(folder: Path, out: str, ranks: int) -> subprocess.Popen[bytes]:
    arguments = ["eval", str(folder / "model"), "--tasks", "all", "--data", str(folder / "data")]
    arguments += ["--out", str(folder / out), "--ranks", str(ranks), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    affinity = sorted(os.sched_getaffinity(0))[:ranks]  # one core for each rank
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, affinity),
    )


def kill_halfway(folder: Path, ranks: int, seconds: float) -> int:
    """SIGKILL the command after half of its time; its ranks die with it. Returns the answers on disk."""
    process = evaluate(folder, "killed", ranks)
    try:
        process.wait(seconds / 2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return sum(path.read_bytes().count(b"\n") for path in (folder / "killed").glob("model/*.jsonl"))


@contextmanager
def _folder(named: Path | None) -> Iterator[Path]:
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="alignkd-full-size-") as name:
        yield Path(name)


if __name__ == "__main__":
    sys.exit(main())
