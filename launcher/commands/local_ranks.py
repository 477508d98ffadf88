"""Run the ranks of a restartable program on this machine, and say which one to blame when they fail."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkd.errors import EXIT_FAILED, UserError
from alignkd.run_folder.paths import log_name
from alignkd.text import counted
from launcher.backends.devices import visible_gpus
from launcher.backends.ranks import Exit, RankGroup, free_port, rank_environments, start_ranks

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL; what is done is on disk
_SHOWN_LINES = 10  # of the log of a rank that failed


@dataclass(frozen=True)
class Failed:
    code: int
    message: str


def rank_variables(ranks: int, device: Literal["auto", "cpu"], cpu_option: str) -> list[dict[str, str]]:
    """The environments of ``ranks`` ranks, on GPUs if there are any. Raises UserError when there are too few;
    ``cpu_option`` is what asks for CPUs."""
    gpus = visible_gpus(os.environ)
    chosen = "cpu" if device == "cpu" or not gpus else "auto"
    if chosen == "auto" and len(gpus) < ranks:
        raise UserError(
            f"--ranks {ranks} needs {counted(ranks, 'GPU')}, and this machine has {len(gpus)}; valid: fewer "
            f"ranks, or {cpu_option}"
        )
    return rank_environments(1, ranks, free_port(), chosen, gpus, os.environ)


def run_ranks(command: Sequence[str], environments: list[dict[str, str]], logs: Path) -> Failed | None:
    """Run ``command`` once per environment until all have ended well (None), or one has failed, which is
    explained on standard error. Rank 0 writes to this process's output."""
    group = start_ranks(command, environments, logs, f"$ {shlex.join(command)}", show_first=True)
    try:
        failed = _first_failure(group)
    except KeyboardInterrupt:
        group.stop(_GRACE_SECONDS)
        print("stopped; the same command resumes", file=sys.stderr)
        return Failed(128 + signal.SIGINT, "stopped")
    if failed is None:
        return None
    group.stop(_GRACE_SECONDS)  # the others would wait for it
    _explain(failed, logs)
    code = failed.code if failed.code > 0 else 128 - failed.code
    return Failed(code, f"rank {failed.rank} failed; see {logs / log_name(failed.rank)}")


def _first_failure(group: RankGroup) -> Exit | None:
    """The rank to blame. One that fails because another has ended may be seen before that one."""
    first: Exit | None = None
    while group.running:
        ended = group.next_exit(timeout=3600.0 if first is None else _GRACE_SECONDS)
        if ended is None and first is not None:
            break
        if ended is not None and ended.code not in (0, EXIT_FAILED):
            return ended
        if ended is not None and ended.code == EXIT_FAILED:
            first = first or ended
    return first


def _explain(failed: Exit, logs: Path) -> None:
    """Rank 0 has told its own error here, unless it was killed."""
    if failed.code < 0:
        name = signal.Signals(-failed.code).name
        print(f"rank {failed.rank} was killed by {name}; the same command resumes", file=sys.stderr)
    elif failed.rank > 0:
        log = logs / log_name(failed.rank)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        print(f"rank {failed.rank} failed, see {log}:", file=sys.stderr)
        print("\n".join(f"  | {line}" for line in lines), file=sys.stderr)
