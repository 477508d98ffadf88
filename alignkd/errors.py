"""The errors that a user sees: one clear message, no traceback, a known exit code.

Everything that a user can cause (a bad key, a missing file, tensors that do not fit) is raised as
:class:`UserError`. ``assert`` is kept for our own invariants.
"""

from __future__ import annotations

import errno
import sys

from alignkd.text import counted

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2  # bad input: never retried by a launcher
EXIT_SAVED_ON_USR1 = 85  # planned stop: saved, may be started again at once
EXIT_SAVED_ON_TERM = 86  # told to go away: saved, whoever sent the signal decides what comes next
EXIT_HUNG = 87  # of a launcher that ended ranks because no step came any more
EXIT_BAD_NODE = 88  # the node cannot train (no GPU, say): a retry must run on other nodes

ERROR_PREFIX = "alignkd: error: "  # the launcher finds a rank's message in its log by this


class AlignkdError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = EXIT_FAILED


class UserError(AlignkdError):
    """Bad input. The message says what, where, and what would be valid."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """Problems of a configuration, collected and shown at once."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{source}: {counted(len(problems), 'problem')}\n{lines}")


class CheckpointError(UserError):
    """A model folder or a training checkpoint that cannot be used, with the reason."""


class TrainingError(AlignkdError):
    """Training cannot continue, for example because the loss is not finite."""


class TakenOverError(TrainingError):
    """Another process writes this run now."""


class FileSystemError(AlignkdError):
    """The file system failed, not the file: a retry may succeed, so a launcher restarts the run."""


class NodeError(AlignkdError):
    """This node cannot train, although others may: a launcher retries without it."""

    exit_code = EXIT_BAD_NODE


_PASSING = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.EBUSY,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ETIMEDOUT,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)


def raise_if_passing(error: BaseException, path: object) -> None:
    """Raise FileSystemError when ``error`` says that a disk, a server or a network failed at ``path``.

    Otherwise (no such file, no permission, broken contents) do nothing: the caller knows better what to say.
    """
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise FileSystemError(f"{path}: the file system failed ({error.strerror}); try again") from error


def report_error(error: AlignkdError) -> int:
    """Print the one message that a user sees on stderr; further lines are indented. Returns the exit code."""
    first, *rest = str(error).splitlines() or [type(error).__name__]
    lines = [ERROR_PREFIX + first, *(line if line.startswith("  ") else f"  {line}" for line in rest)]
    print("\n".join(lines), file=sys.stderr, flush=True)
    return error.exit_code
