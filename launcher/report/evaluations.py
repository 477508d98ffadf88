"""Answer files of `alignkd eval`, matched with the models of the reported runs and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from alignkd.errors import UserError
from alignkd.evaluate.options import OPTIONS_FILE, EvalOptions, model_name, read_options
from alignkd.evaluate.scoring import score_file
from alignkd.evaluate.task_score import TaskScore
from alignkd.evaluate.tasks.own import own_task
from alignkd.evaluate.tasks.registry import OWN, TASKS
from alignkd.evaluate.tasks.task import Question, Task
from alignkd.run_folder.paths import RunPaths
from launcher.report.run_facts import RunFacts


class Role(StrEnum):
    STUDENT = "student"
    START = "start"
    TEACHER = "teacher"


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to one task. ``run`` is the number of the (first) run that has the model in this
    ``role``; ``note`` says what is not usual (a checkpoint, a part of the questions)."""

    name: str
    role: Role
    run: int
    task: str
    note: str
    file: Path
    data: Path
    definition: Task
    score: TaskScore

    def questions(self) -> list[Question]:
        """All questions of the task. Raises UserError."""
        return self.definition.questions(self.data)


def find_evaluations(runs: Sequence[RunFacts], folders: Sequence[Path]) -> tuple[list[Evaluation], list[str]]:
    """Evaluations in ``folders`` (of `alignkd eval --out`) and in RUN/eval, and what could not be scored.

    Students come first, in the order of the runs, then starts, then teachers. Raises UserError for one of
    ``folders`` that no evaluation wrote.
    """
    found: dict[tuple[str, str, str], Evaluation] = {}
    problems: list[str] = []
    usual = [folder for run in runs if (RunPaths(folder := run.folder).evaluation / OPTIONS_FILE).is_file()]
    for out in [*folders, *(RunPaths(folder).evaluation for folder in usual)]:
        options = read_options(out)
        for name, role, number, file in _answer_files(out, options, runs):
            try:
                evaluation = _evaluation(options, name, role, number, file)
            except UserError as error:
                problems.append(str(error))
                continue
            found.setdefault((name, evaluation.task, evaluation.note), evaluation)
    order = list(Role)
    return sorted(found.values(), key=lambda one: (one.task, order.index(one.role), one.run)), problems


def _answer_files(
    out: Path, options: EvalOptions, runs: Sequence[RunFacts]
) -> Iterator[tuple[str, Role, int, Path]]:
    """(name, role, run, file) of the answers of models that the runs have."""
    folders = {model.name: Path(model.folder) for model in options.models}
    for place in sorted(path for path in out.iterdir() if path.is_dir()):
        role = _role(place.name, folders.get(place.name), runs)
        if role is not None:
            for file in sorted(place.glob("*.jsonl")):
                yield place.name, *role, file


def _role(name: str, folder: Path | None, runs: Sequence[RunFacts]) -> tuple[Role, int] | None:
    """By the folder that was evaluated, where it is known. An evaluation in the same place may have been of
    other models, and a folder may have been moved: then by the name that `alignkd eval` gives a model."""
    models = [
        (role, number, model)
        for role in Role
        for number, run in enumerate(runs)
        for model in _models_of(run, role)
    ]
    for role, number, model in models:
        if folder is not None and folder.resolve() == model.resolve():
            return role, number
    for role, number, model in models:
        if (folder is None or not folder.exists()) and model_name(model) == name:
            return role, number
    return None


def _models_of(run: RunFacts, role: Role) -> list[Path]:
    if role is Role.STUDENT:
        return [run.folder, RunPaths(run.folder).student]
    folder = run.model_folder("student" if role is Role.START else "teacher")
    return [] if folder is None else [folder]


def _evaluation(options: EvalOptions, name: str, role: Role, number: int, file: Path) -> Evaluation:
    """Raises UserError for answers that cannot be scored."""
    task_name, dot, first = file.stem.partition(".")
    notes = [f"{first.replace('first-', 'first ')} questions"] if dot else []
    data = Path(options.data)
    task = _task(task_name, options, file)
    score = score_file(task, file, data, partial=bool(dot))
    if role is Role.STUDENT and options.step is not None and name in {model.name for model in options.models}:
        notes.append(f"step {options.step}")
    return Evaluation(name, role, number, task_name, ", ".join(notes), file, data, task, score)


def _task(name: str, options: EvalOptions, file: Path) -> Task:
    if name in TASKS:
        return TASKS[name]
    own = options.own
    if name != OWN or own is None:
        raise UserError(f"{file}: cannot be scored: the evaluation says nothing of a task {name!r:.80}")
    folder = None if own.image_folder is None else Path(own.image_folder)
    return own_task(Path(options.data), own.questions, folder, own.metric)
