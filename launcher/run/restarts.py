"""What the history of a run says about another restart: failures in a row, and nodes to keep away from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from launcher.run.attempts import Attempt, Reason, read_history

# The run's own failures: a preemption or a lost node is not.
COUNTED = (Reason.CRASHED, Reason.HUNG, Reason.BAD_NODE, Reason.TIME_LIMIT)
MAX_LOST = 5  # attempts in a row that lost a node, without a new checkpoint
GIVEN_UP_FOR_NODES = f"given up after {MAX_LOST} attempts that lost a node, without a new checkpoint"
_SUSPECT_AFTER = 2  # failures that began on the same node


def since_submission(run: Path) -> list[Attempt]:
    """The closed attempts since the user last submitted the run, oldest first."""
    submitted = (read_json(RunPaths(run).job) or {}).get("attempts_before", 0)
    return read_history(run)[submitted:]


def in_a_row(attempts: Sequence[Attempt], reasons: Collection[str]) -> int:
    """How many attempts ended for one of ``reasons`` since the last one that saved a new checkpoint.

    Attempts that ended for another reason (a preemption, say) are skipped.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.progressed:
            break
        count += attempt.reason in reasons
    return count


def lost_too_often(attempts: Sequence[Attempt]) -> bool:
    """Does the run itself bring its nodes down?"""
    return in_a_row(attempts, (Reason.NODE_LOST,)) >= MAX_LOST


def suspected_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Nodes to exclude from the next start: at fault once, or blamed twice for a crash or a hang."""
    marks: Counter[str] = Counter()
    for attempt in attempts:
        if attempt.reason in (Reason.NODE_AT_FAULT, Reason.BAD_NODE):
            marks.update(dict.fromkeys(attempt.bad_nodes, _SUSPECT_AFTER))
        elif attempt.reason in (Reason.NODE_LOST, Reason.HUNG):
            marks.update(attempt.bad_nodes)
        elif attempt.reason == Reason.CRASHED and attempt.failed_node is not None:
            marks[attempt.failed_node] += 1
    return tuple(sorted(node for node, count in marks.items() if count >= _SUSPECT_AFTER))
