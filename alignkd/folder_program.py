"""What programs of ranks have in common that work on a folder and resume: ``python -m PROGRAM FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkd.errors import EXIT_USER_ERROR, AlignkdError, report_error

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT


def run_on_folder(usage: str, arguments: Sequence[str], work: Callable[[Path], int]) -> int:
    """The exit code of ``work`` on the folder that is the only argument, or that of its error. ``usage``:
    program and argument."""
    if len(arguments) != 1:
        print(f"usage: python -m {usage}", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        return work(Path(arguments[0]))
    except AlignkdError as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return EXIT_INTERRUPTED
