"""The logs of a run: one file per rank, where every attempt begins with a marker line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths, log_name
from launcher.run.attempts import FAILURES, open_attempt, read_history
from launcher.run.exit_codes import ATTEMPT_PREFIX, clean_lines, error_message
from launcher.run.job_log import (
    cause_of,
    ended_at_once,
    job_lines,
    job_without_attempt,
    log_of_job,
    newest_job,
    out_of_memory,
)
from launcher.run.lock import is_locked

_BEGIN = re.compile(rf"{ATTEMPT_PREFIX}(\d+): ")
_SHOWN = 40  # lines of a log that has no error message


@dataclass(frozen=True)
class FirstError:
    """The error of the rank that failed first; ``lines`` are its message, or the end of its log.

    Where no rank recorded an exit, ``rank`` is None and ``log`` is that of the job; where the job did not get
    as far as an attempt, ``attempt`` is None too. ``cause`` is what the job's log says about it, if anything.
    """

    attempt: int | None
    job: str | None  # None without a queue
    rank: int | None
    exit_code: int | None
    cause: str | None
    log: str
    lines: list[str]


def attempt_lines(run: Path, rank: int, attempt: int | None) -> list[str]:
    """What a rank logged in one attempt (None: the last one), its marker line included.

    A log without marker lines (earlier versions of the local back end wrote none) is one attempt. Raises
    UserError when there is no such log or attempt.
    """
    path = RunPaths(run).log(rank)
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"{path}: {_ranks_text(run)}") from None
    return _lines_of(path, data, attempt)


def _lines_of(path: Path, data: bytes, attempt: int | None) -> list[str]:
    lines = clean_lines(data)
    starts = [(int(found[1]), index) for index, line in enumerate(lines) if (found := _BEGIN.match(line))]
    if not starts:
        if attempt not in (None, 1):
            raise UserError(f"{path} has no attempt {attempt}: it holds one attempt only")
        return lines
    wanted = starts[-1][0] if attempt is None else attempt
    for place, (number, index) in enumerate(starts):
        if number == wanted:
            end = starts[place + 1][1] if place + 1 < len(starts) else len(lines)
            return lines[index:end]
    known = ", ".join(str(number) for number, _ in starts)
    raise UserError(f"{path} has no attempt {wanted}; it has: {known}")


def job_log_lines(run: Path, attempt: int | None) -> tuple[str, list[str]]:
    """A job of the run and what it logged: the job of ``attempt``, else the last one.

    Raises UserError when there is none.
    """
    if attempt is None:
        job = job_without_attempt(run, read_history(run)) or newest_job(run)
        lines = job_lines(run, job) if job else []
    else:
        jobs = {closed.number: closed.job for closed in [*read_history(run), open_attempt(run)] if closed}
        job = jobs.get(attempt)
        lines = job_lines(run, job, attempt) if job else []
    if job is None or not lines:
        which = "no job of this run" if attempt is None else f"no job of attempt {attempt}"
        raise UserError(f"{RunPaths(run).logs}: {which} has left a log")
    return job, lines


def _ranks_text(run: Path) -> str:
    found = sorted(
        int(path.stem[5:]) for path in RunPaths(run).logs.glob(log_name("*")) if path.stem[5:].isdigit()
    )
    if not found:
        job = newest_job(run)
        return "no rank has started yet" + (f"; see what job {job} said with --job" if job else "")
    ranks = "rank 0 only" if found == [0] else f"ranks {found[0]} to {found[-1]}"
    return f"no such log; there are logs of {ranks}"


def log_of_failure(run: Path, rank: int) -> Path:
    """The log that tells why a rank of the last attempt failed: the rank's own or, when it recorded no exit
    and has not hung, that of its ssh connection."""
    said = RunPaths(run).ssh_log(rank)
    ended = RunPaths(run).exit_file(rank).exists() or RunPaths(run).hang.exists()
    return said if not ended and said.exists() and said.stat().st_size > 0 else RunPaths(run).log(rank)


def first_error(run: Path, attempt: int | None) -> FirstError | None:
    """The rank that failed first in ``attempt``, or else in the last attempt that failed, and its error.

    Errors of the other ranks only follow from the first one. A job that failed before it began an attempt
    comes first. None when there is no such failure.
    """
    history = read_history(run)
    job = job_without_attempt(run, history)
    lines = [] if job is None or attempt is not None else job_lines(run, job)
    if lines and open_attempt(run) is None and ended_at_once(lines) is None:
        return _job_error(run, job or "", None, lines)
    failed = [a for a in history if a.failed_rank is not None or a.reason in FAILURES]
    chosen = [a for a in failed if attempt is None or a.number == attempt]
    if not chosen:
        return None
    last = chosen[-1]
    said = job_lines(run, last.job, last.number)
    if last.failed_rank is None:
        return _job_error(run, last.job, last.number, said)
    path = log_of_failure(run, last.failed_rank)
    if last == history[-1] and path != RunPaths(run).log(last.failed_rank):
        lines = clean_lines(path.read_bytes())
    else:
        path = RunPaths(run).log(last.failed_rank)
        lines = attempt_lines(run, last.failed_rank, last.number)
    message = error_message(lines)
    shown = message.splitlines() if message else lines[-_SHOWN:]
    job = last.job if said else None
    return FirstError(
        last.number, job, last.failed_rank, last.exit_code, out_of_memory(said), str(path), shown
    )


def _job_error(run: Path, job: str, attempt: int | None, lines: list[str]) -> FirstError:
    path = log_of_job(run, job)
    return FirstError(attempt, job, None, None, cause_of(lines), str(path), lines[-_SHOWN:])


def follow(run: Path, rank: int, ended: Callable[[], bool], seconds: float = 0.5) -> Iterator[str]:
    """The log of a rank from the start of the last attempt, then new lines until ``ended()`` is true.

    Raises UserError when the run has ended without a log of this rank.
    """
    path = RunPaths(run).log(rank)
    while not path.exists() and not ended():
        time.sleep(seconds)
    if not path.exists():
        raise UserError(f"{path}: {_ranks_text(run)}")
    with path.open("rb") as file:
        before, newline, rest = file.read().rpartition(b"\n")
        yield from (line + "\n" for line in _lines_of(path, before + newline, None))
        while True:
            finished = ended()  # before reading: what was written before the end is still shown
            data = file.read()
            # A line that is still being written is shown when it is complete.
            whole, newline, rest = (rest + data).rpartition(b"\n")
            yield from (line + "\n" for line in clean_lines(whole + newline))
            if not data and finished:
                yield from (line + "\n" for line in clean_lines(rest))
                return
            if not data:
                time.sleep(seconds)


def is_over(run: Path) -> bool:
    """From the files only: no attempt is open or about to be, and the last one ended for good."""
    if is_locked(run) or open_attempt(run) is not None:
        return False
    history = read_history(run)
    return bool(history) and history[-1].reason in ("done", "stopped")
