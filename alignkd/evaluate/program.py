"""The course of an evaluation: every model, every task, all ranks; then the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignkd.distributed.ranks import Ranks
from alignkd.errors import TrainingError
from alignkd.evaluate.answering import Progress as Report
from alignkd.evaluate.answering import (
    Work,
    answer_own_share,
    is_finished,
    merge_parts,
    remove_parts,
)
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.model import load
from alignkd.evaluate.options import EvalOptions, ModelChoice, answers_file
from alignkd.evaluate.scoring import score_file
from alignkd.evaluate.task_score import TaskScore
from alignkd.evaluate.tasks.task import NothingToScore, Question, Task

_DIGEST = 16  # hexadecimal digits of a model's hash


def answer_all(options: EvalOptions, ranks: Ranks | None) -> None:
    """Write the answers of all models to all tasks. Collective; ``ranks`` None: this process alone."""
    place = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    tasks = [(task, task.questions(Path(options.data))) for task in options.chosen_tasks()]
    for choice in options.models:
        model = load(choice.folder, step=options.step, precision=options.precision)  # on this rank's device
        digest = model.fingerprint()[:_DIGEST]
        for task, questions in tasks:
            work = work_of(options, choice, model, digest, task, questions, *place)
            _answer_task(model, work, ranks)
        del model  # before the next one takes its memory


def score_all(options: EvalOptions) -> dict[str, list[TaskScore]]:
    """Tasks whose first questions hold nothing to score are left out, with a warning. Raises UserError when
    that leaves none."""
    data, scores, nothing = Path(options.data), dict[str, list[TaskScore]](), None
    for choice in options.models:
        scores[choice.name] = []
        for task in options.chosen_tasks():
            file = answers_file(options, choice.name, task.name)
            try:
                found = score_file(task, file, data, partial=options.limit is not None)
            except NothingToScore as error:
                nothing = error
                Console(stderr=True).print(f"warning: {task.name}: {error}", markup=False, highlight=False)
            else:
                scores[choice.name].append(found)
    if nothing is not None and not any(scores.values()):
        raise nothing
    return scores


def work_of(
    options: EvalOptions,
    choice: ModelChoice,
    model: AnsweringModel,
    digest: str,
    task: Task,
    questions: list[Question],
    rank: int = 0,
    ranks: int = 1,
) -> Work:
    """One rank's share of one model's answers to one task. ``digest`` tells the weights."""
    padding = model.padding_for(options.image_padding, task.pad_images)
    metadata = {
        "model": digest,
        "precision": model.precision,
        "batch_size": options.batch_size,
        "image_padding": padding,
        **model.answer_settings(),
    }
    return Work(
        task,
        questions[: options.limit],
        answers_file(options, choice.name, task.name),
        choice.name,
        metadata,
        options.batch_size,
        padding,
        rank,
        ranks,
    )


def _answer_task(model: AnsweringModel, work: Work, ranks: Ranks | None) -> None:
    """Collective. No rank comes here before all have left the task before, so that none sees files of this
    one that others have begun to merge."""
    finished = is_finished(work)
    if ranks is not None:
        with _others_alive():
            finished = ranks.broadcast_object(finished)  # a network file system may show it later elsewhere
    if not finished:
        with _shown(work) as progress:
            answer_own_share(model, work, progress)
        if ranks is not None:
            with _others_alive():
                ranks.barrier()  # all parts are written
        if work.rank == 0:
            merge_parts(work)
    elif work.rank == 0:
        remove_parts(work)  # of a start that was killed after it had merged them


@contextmanager
def _others_alive() -> Iterator[None]:
    """Raises TrainingError where a collective fails, because a rank has ended."""
    try:
        yield
    except RuntimeError as error:  # torch's
        first = str(error).splitlines()[0]
        raise TrainingError(f"another rank has ended early; its log says why ({first})") from None


@contextmanager
def _shown(work: Work) -> Iterator[Report]:
    """A bar of the first rank's questions, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=work.rank != 0 or not console.is_terminal) as bar:
        total = sum(map(len, work.batches()))
        shown = bar.add_task(f"{work.name}, {work.task.name}", total=total)
        yield lambda done: bar.update(shown, completed=done)
