"""Applies one mutant at a time to a copy of the tree, and runs its tests there."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.mutants.catalogue import Mutant

TIMEOUT_SECONDS = 150.0
TESTS_PASSED, TESTS_FAILED = 0, 1  # pytest's exit codes; others mean that no test has judged


class Verdict(StrEnum):
    KILLED = "killed"  # a test failed, or hung
    SURVIVED = "SURVIVED"
    EXPLAINED = "explained"  # survived, with a written reason
    ERROR = "ERROR"  # the tests did not run


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    verdict: Verdict
    seconds: float
    output: str  # of pytest


def judge(mutants: Sequence[Mutant], root: Path, jobs: int) -> Iterator[Outcome]:
    """The outcome of each mutant, as they come. Raises RuntimeError when the tests fail without a mutant:
    then a failure would say nothing about one."""
    with _copies(root, jobs) as free, ThreadPoolExecutor(jobs) as pool:
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        unchanged = pool.submit(_unchanged, free, tests)
        yield from pool.map(lambda mutant: _judge_one(free, mutant), mutants)
        code, output = unchanged.result()
    if code != TESTS_PASSED:
        raise RuntimeError(f"without a mutant, the tests do not pass:\n{output}")


def _unchanged(free: queue.Queue[Path], tests: Sequence[str]) -> tuple[int, str]:
    tree = free.get()
    try:
        return _pytest(tree, tests, 20 * TIMEOUT_SECONDS)
    finally:
        free.put(tree)


def _judge_one(free: queue.Queue[Path], mutant: Mutant) -> Outcome:
    tree = free.get()
    started = time.monotonic()
    before = mutant.apply(tree)
    try:
        code, output = _pytest(tree, mutant.tests, TIMEOUT_SECONDS)
    finally:
        (tree / mutant.file).write_text(before, encoding="utf-8")
        free.put(tree)
    verdict = {TESTS_FAILED: Verdict.KILLED, TESTS_PASSED: Verdict.SURVIVED}.get(code, Verdict.ERROR)
    if verdict is Verdict.SURVIVED and mutant.survives:
        verdict = Verdict.EXPLAINED
    return Outcome(mutant, verdict, time.monotonic() - started, output)


def _pytest(tree: Path, tests: Sequence[str], timeout: float) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # A cached module of the same size and second would hide a mutant.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return TESTS_FAILED, f"no end in {timeout:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that a test has left behind, too
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _copies(root: Path, count: int) -> Iterator[queue.Queue[Path]]:
    """``count`` copies of the files of ``root`` that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = [name for name in listed.split("\0") if name and (root / name).is_file()]
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="alignkd-mutants-") as folder:
        for number in range(count):
            tree = Path(folder) / f"tree-{number}"
            for name in names:
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, tree / name)
            free.put(tree)
        yield free
