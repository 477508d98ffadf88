"""Answer files of `alignkd eval`, matched with the models of the reported runs and scored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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

_ANSWERS = re.compile(r"[^.]+(\.first-\d+)?\.jsonl")  # of all ranks; each rank's own are TASK.part-R.jsonl


class Role(StrEnum):
    STUDENT = "student"
    START = "start"
    TEACHER = "teacher"


@dataclass(frozen=True)
class Place:
    """What a model is to the runs: its ``role`` in run number ``run``, the first that has it. ``student_of``:
    number of the run that trained it, if it is one of them."""

    role: Role
    run: int
    student_of: int | None


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to one task, or to a part of its questions."""

    name: str
    place: Place
    step: int | None  # of the checkpoint that was asked for
    task: str
    part: str  # which of the questions; empty: all
    file: Path
    data: Path
    definition: Task
    score: TaskScore
    qualifier: str = ""  # tells it apart from other models of this name

    @property
    def label(self) -> str:
        return self.name if self.step is None else f"{self.name}, step {self.step}"

    @property
    def title(self) -> str:
        """As no other model of the page is called."""
        return f"{self.label} ({self.qualifier})" if self.qualifier else self.label

    @property
    def is_student_in_question(self) -> bool:
        return self.place.student_of == 0

    def questions(self) -> list[Question]:
        """All questions of the task. Raises UserError."""
        return self.definition.questions(self.data)


def find_evaluations(runs: Sequence[RunFacts], folders: Sequence[Path]) -> tuple[list[Evaluation], list[str]]:
    """Evaluations in ``folders`` (of `alignkd eval --out`) and in RUN/eval, and what could not be scored.

    Of each task the first run's student comes first (its newest step first), then its start, its teacher,
    and the other runs' models. Raises UserError for one of ``folders`` that no evaluation wrote.
    """
    found: dict[tuple[object, ...], Evaluation] = {}
    problems: list[str] = []
    follow_ups = [RunPaths(run.folder).evaluation for run in runs]
    for out in [*folders, *(out for out in follow_ups if (out / OPTIONS_FILE).is_file())]:
        options = read_options(out)
        for name, place, file in _answer_files(out, options, runs):
            if not _ANSWERS.fullmatch(file.name):
                problems.append(
                    f"{file}: this evaluation is not complete; the same `alignkd eval` resumes it"
                )
                continue
            try:
                evaluation = _evaluation(options, name, place, file)
            except UserError as error:
                problems.append(str(error))
                continue
            key = (name, place, evaluation.step, evaluation.task, evaluation.part)
            first = found.setdefault(key, evaluation)
            if first.file.resolve() != file.resolve():
                problems.append(f"{file}: not shown: {first.file} has answers of the same model to this task")
    return _told_apart(sorted(found.values(), key=_order), runs), problems


def by_questions(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Those of the same task and part of its questions together, in their order."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for one in evaluations:
        groups.setdefault((one.task, one.part), []).append(one)
    return list(groups.values())


def _order(one: Evaluation) -> tuple[str, str, int, int, float]:
    newest_first = -math.inf if one.step is None else -one.step
    return one.task, one.part, one.place.run, list(Role).index(one.place.role), newest_first


def _told_apart(evaluations: Sequence[Evaluation], runs: Sequence[RunFacts]) -> list[Evaluation]:
    """With a qualifier where several models have one name: two folders, or two runs, may be called alike."""
    places: dict[str, set[Place]] = {}
    for one in evaluations:
        places.setdefault(one.name, set()).add(one.place)
    return [
        replace(one, qualifier=_qualifier(one.place, runs)) if len(places[one.name]) > 1 else one
        for one in evaluations
    ]


def _qualifier(place: Place, runs: Sequence[RunFacts]) -> str:
    return str(place.role) if len(runs) == 1 else f"{place.role} of {runs[place.run].name}"


def _answer_files(
    out: Path, options: EvalOptions, runs: Sequence[RunFacts]
) -> Iterator[tuple[str, Place, Path]]:
    """(name, place, file) of the answers of models that the runs have."""
    folders = {model.name: Path(model.folder) for model in options.models}
    for answers in sorted(path for path in out.iterdir() if path.is_dir()):
        place = _place(answers.name, folders.get(answers.name), runs)
        if place is not None:
            for file in sorted(answers.glob("*.jsonl")):
                yield answers.name, place, file


def _place(name: str, folder: Path | None, runs: Sequence[RunFacts]) -> Place | None:
    """By the folder that was evaluated, where it is known. An evaluation in the same place may have been of
    other models, and a folder may have been moved: then by the name that `alignkd eval` gives a model."""
    models = [
        (role, number, model)
        for number, run in enumerate(runs)
        for role in Role
        for model in _models_of(run, role)
    ]
    known = folder is not None and folder.exists()
    fits = [
        (role, number)
        for role, number, model in models
        if (folder is not None and folder.resolve() == model.resolve())
        or (not known and model_name(model) == name)
    ]
    if not fits:
        return None
    return Place(*fits[0], next((number for role, number in fits if role is Role.STUDENT), None))


def _models_of(run: RunFacts, role: Role) -> list[Path]:
    if role is Role.STUDENT:
        return [run.folder, RunPaths(run.folder).student]
    folder = run.model_folder("student" if role is Role.START else "teacher")
    return [] if folder is None else [folder]


def _evaluation(options: EvalOptions, name: str, place: Place, file: Path) -> Evaluation:
    """Raises UserError for answers that cannot be scored."""
    task_name, dot, first = file.stem.partition(".")
    part = f"{first.replace('first-', 'first ')} questions" if dot else ""
    data = Path(options.data)
    task = _task(task_name, options, file)
    score = score_file(task, file, data, partial=bool(dot))
    step = options.step if place.student_of is not None and name in _names(options) else None
    return Evaluation(name, place, step, task_name, part, file, data, task, score)


def _names(options: EvalOptions) -> set[str]:
    return {model.name for model in options.models}


def _task(name: str, options: EvalOptions, file: Path) -> Task:
    if name in TASKS:
        return TASKS[name]
    own = options.own
    if name != OWN or own is None:
        raise UserError(f"{file}: cannot be scored: the evaluation says nothing of a task {name!r:.80}")
    folder = None if own.image_folder is None else Path(own.image_folder)
    return own_task(Path(options.data), own.questions, folder, own.metric)
