"""What went wrong on one rank, as the others hear of it."""

from __future__ import annotations

from alignkd.errors import (
    AlignkdError,
    CheckpointError,
    FileSystemError,
    TakenOverError,
    TrainingError,
    UserError,
)

# A launcher tells by the exit code whether another try makes sense, so the kind travels along.
_KINDS: dict[str, type[AlignkdError]] = {
    kind.__name__: kind
    for kind in (CheckpointError, UserError, FileSystemError, TakenOverError, TrainingError)
}


def describe_failure(rank: int, error: BaseException) -> tuple[str, str]:
    """(kind, message) to send to other ranks."""
    kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS), None)
    if kind is None:
        return TrainingError.__name__, f"rank {rank} failed: {type(error).__name__}: {error}"
    return kind, f"rank {rank}: {error}"


def error_elsewhere(kind: str, message: str) -> AlignkdError:
    """What a rank raises that is told (kind, message)."""
    return _KINDS[kind](message)


def as_shown(error: Exception) -> Exception:
    """``error``, or where the file system has refused something, what a user sees of it."""
    if not isinstance(error, OSError):
        return error
    shown = FileSystemError(str(error))
    shown.__cause__ = error
    return shown
