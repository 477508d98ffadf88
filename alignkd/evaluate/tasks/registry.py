"""All benchmarks by name, in the order of the paper's table."""

from __future__ import annotations

from alignkd.config.dotted import did_you_mean
from alignkd.errors import UserError
from alignkd.evaluate.tasks import gqa, mmbench, mme, pope, sample, sqa, textvqa
from alignkd.evaluate.tasks.task import Task

BENCHMARKS: dict[str, Task] = {
    task.name: task for task in (gqa.TASK, sqa.TASK, textvqa.TASK, pope.TASK, mme.TASK, mmbench.TASK)
}
TASKS: dict[str, Task] = BENCHMARKS | {sample.TASK.name: sample.TASK}  # that a name alone tells
ALL = "all"  # of the benchmarks
OWN = "own"


def task_named(name: str) -> Task:
    """Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(
            f"task {name!r:.80} is unknown; valid: {', '.join(TASKS)}{did_you_mean(name, list(TASKS))}"
        )
    return TASKS[name]


def tasks_named(names: str) -> list[Task]:
    """``gqa,pope`` or ``all`` -> tasks, each once, in the order of the table; raises UserError."""
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    valid = [*TASKS, ALL]
    for name in wanted:
        if name not in valid:
            raise UserError(
                f"task {name!r:.80} is unknown; valid: {', '.join(valid)}, or {OWN} alone"
                f"{did_you_mean(name, valid)}"
            )
    if not wanted:
        raise UserError(f"no task is named; valid: {', '.join(valid)}, or {OWN} alone")
    return [task for name, task in TASKS.items() if name in wanted or (ALL in wanted and name in BENCHMARKS)]
