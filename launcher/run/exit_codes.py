"""From the exit codes of all ranks to the launcher's own, and to what the user is shown."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from alignkd.errors import (
    ERROR_PREFIX,
    EXIT_OK,
    EXIT_SAVED_ON_TERM,
    EXIT_SAVED_ON_USR1,
    EXIT_USER_ERROR,
)

SAVED = (EXIT_SAVED_ON_USR1, EXIT_SAVED_ON_TERM)
ATTEMPT_PREFIX = "=== attempt "  # rank.sh begins every attempt with it
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 30
_LINE_CHARACTERS = 200
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")  # as a traceback ends


def is_failure(code: int) -> bool:
    return code not in (EXIT_OK, *SAVED)


def failed_rank(codes: Mapping[int, int]) -> int | None:
    """The rank to blame (``codes`` is in the order of the ends); None when none failed.

    It is the one that failed first; but one that complains of bad input says why, whereas the others only
    lost their connection to it, and may have been quicker to end.
    """
    complaints = (rank for rank, code in codes.items() if code == EXIT_USER_ERROR)
    failures = (rank for rank, code in codes.items() if is_failure(code))
    return next(complaints, next(failures, None))


def exit_code(codes: Mapping[int, int]) -> int:
    """0 when all finished, 85 or 86 when all that stopped had saved, else the first failing rank's code."""
    rank = failed_rank(codes)
    if rank is not None:
        return codes[rank] if codes[rank] > 0 else 128 - codes[rank]
    stops = [code for code in codes.values() if code != EXIT_OK]
    # TERM says "go away", so it wins where both were seen.
    return max(stops, default=EXIT_OK)


def failure_report(rank: int, code: int, log: Path) -> str:
    """Why a rank failed: its own message for a user's error, else the last lines of its log."""
    lines = _last_attempt(log)
    message = error_message(lines)
    if code == EXIT_USER_ERROR and message:
        return message
    shown = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:]) or "  (it wrote nothing)"
    return f"rank {rank} {_end(code)}; the last lines of {log}:\n{shown}"


def failure_line(rank: int, code: int, log: Path) -> str:
    """The same in one line."""
    lines = _last_attempt(log)
    message = (error_message(lines) or "").partition("\n")[0]
    said = (
        message
        or next((line for line in reversed(lines) if _EXCEPTION.match(line)), "")
        or "".join(lines[-1:])
    )
    return f"rank {rank} {_end(code)}" + (f": {shorten(said, _LINE_CHARACTERS)}" if said else "")


def _end(code: int) -> str:
    number = ended_by(code)
    if number is None:
        return f"ended with exit code {code}"
    return f"was ended by {_signal_name(number)}" + ("" if code < 0 else f" (exit code {code})")


def ended_by(code: int) -> int | None:
    """The signal that ended a process, as subprocess (-9) or a shell (137) tells; None for an exit."""
    if code < 0:
        return -code
    return code - 128 if code > 128 and code - 128 in set(signal.Signals) else None


def _last_attempt(log: Path) -> list[str]:
    """The last lines of a log; the attempts before have had their say."""
    lines = tail(log)
    return lines[
        1 + max((n for n, line in enumerate(lines) if line.startswith(ATTEMPT_PREFIX)), default=-1) :
    ]


def tail(log: Path) -> list[str]:
    """The last lines of a log, at most 64 KiB of it, carriage returns of progress bars taken as line ends."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return clean_lines(file.read())
    except OSError:
        return []


def clean_lines(data: bytes) -> list[str]:
    """Lines of a log that are not empty, safe to show on a terminal."""
    text = data.decode("utf-8", errors="replace")
    # Control characters of a log (colours, bells) are not for the user's terminal.
    clean = "".join(c if c.isprintable() or c in "\n\r\t" else "?" for c in text)
    return [line for line in clean.splitlines() if line.strip()]


def error_message(lines: list[str]) -> str | None:
    """The rank's last error as ``report_error`` wrote it, with the lines that belong to it."""
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
