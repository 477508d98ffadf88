"""From the exit codes of all ranks to the exit code of the launcher, and to the message for the user."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from alignkd.errors import (
    ERROR_PREFIX,
    EXIT_HUNG,
    EXIT_OK,
    EXIT_SAVED_ON_TERM,
    EXIT_SAVED_ON_USR1,
    EXIT_USER_ERROR,
)

SAVED = (EXIT_SAVED_ON_USR1, EXIT_SAVED_ON_TERM)
ATTEMPT_PREFIX = "=== attempt "  # how every attempt begins in the log of a rank
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 30
_LINE_CHARACTERS = 200
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")  # last line of a traceback


def is_failure(code: int) -> bool:
    return code not in (EXIT_OK, *SAVED)


def failed_rank(codes: Mapping[int, int]) -> int | None:
    """The rank to blame, from exit codes in the order in which the ranks ended; None when none failed.

    That is a rank that reports bad input, if there is one: the others only lost their connection to it, and
    may have ended before it. Otherwise it is the rank that failed first.
    """
    complaints = (rank for rank, code in codes.items() if code == EXIT_USER_ERROR)
    failures = (rank for rank, code in codes.items() if is_failure(code))
    return next(complaints, next(failures, None))


def exit_code(codes: Mapping[int, int]) -> int:
    """0 when all ranks finished, 85 or 86 when all that stopped had saved, else the failed rank's code."""
    rank = failed_rank(codes)
    if rank is not None:
        return codes[rank] if codes[rank] > 0 else 128 - codes[rank]
    stops = [code for code in codes.values() if code != EXIT_OK]
    # SIGTERM is the stronger request, so it wins where ranks received both signals.
    return max(stops, default=EXIT_OK)


def failure_report(rank: int, code: int, log: Path, node: str | None = None) -> str:
    """Why a rank failed (on ``node``, of several): its own message for a user error, else the last lines of
    its log."""
    lines = _last_attempt(log)
    message = error_message(lines)
    if code in (EXIT_USER_ERROR, EXIT_HUNG) and message:
        return message
    shown = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:]) or "  (empty)"
    place = "" if node is None else f" on {node}"
    return f"rank {rank} {_end(code)}{place}; the last lines of {log}:\n{shown}"


def failure_line(rank: int, code: int, log: Path) -> str:
    """``failure_report`` in one line."""
    lines = _last_attempt(log)
    message = (error_message(lines) or "").partition("\n")[0]
    exception = next((line for line in reversed(lines) if _EXCEPTION.match(line)), "")
    why = message or exception or "".join(lines[-1:])
    return f"rank {rank} {_end(code)}" + (f": {shorten(why, _LINE_CHARACTERS)}" if why else "")


def _end(code: int) -> str:
    if code == EXIT_HUNG:
        return "hung"
    number = ended_by(code)
    if number is None:
        return f"ended with exit code {code}"
    return f"was killed by {_signal_name(number)}" + ("" if code < 0 else f" (exit code {code})")


def ended_by(code: int) -> int | None:
    """The signal that ended a process, from the code of subprocess (-9) or a shell (137); None: it exited."""
    if code < 0:
        return -code
    return code - 128 if code > 128 and code - 128 in set(signal.Signals) else None


def _last_attempt(log: Path) -> list[str]:
    """The last lines of a log, without those of earlier attempts."""
    lines = tail(log)
    starts = [number for number, line in enumerate(lines) if line.startswith(ATTEMPT_PREFIX)]
    return lines[starts[-1] + 1 :] if starts else lines


def tail(log: Path) -> list[str]:
    """The last lines of a log, at most 64 KiB. Carriage returns of progress bars count as line ends."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return clean_lines(file.read())
    except OSError:
        return []


def clean_lines(data: bytes) -> list[str]:
    """The lines of a log that are not empty, without control characters, which would reach the terminal."""
    text = data.decode("utf-8", errors="replace")
    clean = "".join(c if c.isprintable() or c in "\n\r\t" else "?" for c in text)
    return [line for line in clean.splitlines() if line.strip()]


def error_message(lines: list[str]) -> str | None:
    """The last error that ``report_error`` wrote, with its indented lines; None when there is none."""
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith(ERROR_PREFIX):
            first = lines[index].removeprefix(ERROR_PREFIX)
            rest = []
            for line in lines[index + 1 :]:
                if not line.startswith("  "):
                    break
                rest.append(line)
            return "\n".join([first, *rest])
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
