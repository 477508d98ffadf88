"""All benchmarks by name, in the order of the paper's table."""

from __future__ import annotations

from alignkd.config.dotted import did_you_mean
from alignkd.errors import UserError
from alignkd.evaluate.tasks import gqa, mmbench, mme, pope, sqa, textvqa
from alignkd.evaluate.tasks.task import Task

BENCHMARKS: dict[str, Task] = {
    task.name: task for task in (gqa.TASK, sqa.TASK, textvqa.TASK, pope.TASK, mme.TASK, mmbench.TASK)
}
ALL = "all"


def tasks_named(names: str) -> list[Task]:
    """``gqa,pope`` or ``all`` -> tasks, each once, in the order of the table; raises UserError."""
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in BENCHMARKS and name != ALL:
            raise UserError(
                f"task {name!r:.80} is unknown; valid: {', '.join(BENCHMARKS)}, {ALL}"
                f"{did_you_mean(name, [*BENCHMARKS, ALL])}"
            )
    if not wanted:
        raise UserError(f"no task is named; valid: {', '.join(BENCHMARKS)}, {ALL}")
    return [task for name, task in BENCHMARKS.items() if name in wanted or ALL in wanted]
