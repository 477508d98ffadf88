"""``alignkd eval MODEL ...``: check the request, then run the ranks that answer and score."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from alignkd.errors import EXIT_FAILED, UserError
from alignkd.evaluate.options import EvalOptions, write_options
from alignkd.evaluate.scoring import check_data
from alignkd.run_folder.paths import log_name
from alignkd.text import counted
from launcher.backends.devices import visible_gpus
from launcher.backends.ranks import Exit, RankGroup, free_port, rank_environments, start_ranks

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL; answers are on disk as they come
_SHOWN_LINES = 10  # of the log of a rank that failed


def evaluation_command(out: Path | str) -> list[str]:
    """One rank of an evaluation; it reads the options in ``out`` and its rank from the environment."""
    return [sys.executable, "-m", "alignkd.evaluate", str(out)]


def absolute(options: EvalOptions) -> EvalOptions:
    """The same with absolute paths, for ranks that start in another folder."""
    own = options.own
    if own is not None and own.image_folder is not None:
        own = replace(own, image_folder=os.path.abspath(own.image_folder))
    return replace(
        options,
        models=tuple(replace(model, folder=os.path.abspath(model.folder)) for model in options.models),
        data=os.path.abspath(options.data),
        out=os.path.abspath(options.out),
        own=own,
    )


def run_evaluation(options: EvalOptions, ranks: int, device: Literal["auto", "cpu"]) -> int:
    """Run an evaluation on this machine, and return its exit code. Rank 0 prints the result.

    Raises UserError for a wrong request, before any model is loaded.
    """
    options.check()
    check_data(options.chosen_tasks(), Path(options.data))
    gpus = visible_gpus(os.environ)
    chosen = "cpu" if device == "cpu" or not gpus else "auto"
    if chosen == "auto" and len(gpus) < ranks:
        raise UserError(
            f"--ranks {ranks} needs {counted(ranks, 'GPU')}, and this machine has {len(gpus)}; valid: fewer "
            "ranks, or --device cpu"
        )
    write_options(absolute(options))
    environments = rank_environments(1, ranks, free_port(), chosen, gpus, os.environ)
    command, logs = evaluation_command(options.out), Path(options.out) / "logs"
    group = start_ranks(command, environments, logs, f"$ {shlex.join(command)}", show_first=True)
    try:
        failed = _first_failure(group)
    except KeyboardInterrupt:
        group.stop(_GRACE_SECONDS)
        print("stopped; the same command resumes", file=sys.stderr)
        return _failed(128 + signal.SIGINT, "stopped", options)
    if failed is None:
        return 0
    group.stop(_GRACE_SECONDS)  # the others would wait for it
    _explain(failed, logs)
    code = failed.code if failed.code > 0 else 128 - failed.code
    return _failed(code, f"rank {failed.rank} failed; see {logs / log_name(failed.rank)}", options)


def _failed(code: int, message: str, options: EvalOptions) -> int:
    if options.as_json:
        print(json.dumps({"error": message, "code": code}))
    return code


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
