"""An error of one rank, as the other ranks are told of it."""

from __future__ import annotations

from alignkd.errors import (
    AlignkdError,
    CheckpointError,
    FileSystemError,
    TakenOverError,
    TrainingError,
    UserError,
)

# The kind travels along: by the exit code the launcher decides whether to retry.
_KINDS: dict[str, type[AlignkdError]] = {
    kind.__name__: kind
    for kind in (CheckpointError, UserError, FileSystemError, TakenOverError, TrainingError)
}


def describe_failure(rank: int, error: BaseException) -> tuple[str, str]:
    """(kind, message) to send to the other ranks."""
    kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS), None)
    if kind is None:
        return TrainingError.__name__, f"rank {rank} failed: {type(error).__name__}: {error}"
    return kind, f"rank {rank}: {error}"


def error_elsewhere(kind: str, message: str) -> AlignkdError:
    """The error to raise on a rank that was sent (kind, message)."""
    return _KINDS[kind](message)


def as_shown(error: Exception) -> Exception:
    """``error`` itself, or for an OSError the FileSystemError that a user sees instead."""
    if not isinstance(error, OSError):
        return error
    shown = FileSystemError(str(error))
    shown.__cause__ = error
    return shown
