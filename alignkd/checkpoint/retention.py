"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Collection


def expired_steps(
    committed: Collection[int],
    verified: Collection[int],
    protected: Collection[int],
    keep_last: int | None,
    keep_every: int | None,
) -> list[int]:
    """Steps to remove, oldest first. ``keep_last`` None keeps all.

    Only checkpoints that this process has verified count towards ``keep_last``, and only what is older than
    all of those goes: a checkpoint that merely looks complete never drives out one that is. ``protected`` and
    multiples of ``keep_every`` stay.
    """
    newest = sorted(set(verified) & set(committed))[-keep_last:] if keep_last is not None else []
    if keep_last is None or len(newest) < keep_last:
        return []
    return sorted(
        step
        for step in committed
        if step < newest[0] and step not in protected and not (keep_every and step % keep_every == 0)
    )
