"""The accuracy of a task at the edge of a step: the student answers its questions, each rank a part of them.

Training goes on as if nothing had been asked: ``evaluate.live_student`` leaves the engine alone, and random
states are kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import OutOfMemoryError

from alignkd.distributed.ranks import Ranks
from alignkd.engine.signals import StopRequest
from alignkd.errors import AlignkdError, FileSystemError, TrainingError, UserError
from alignkd.evaluate.answering import Work, answers_by_batch
from alignkd.evaluate.asked_task import AskedTask
from alignkd.evaluate.live_student import LiveStudent, own_linear
from alignkd.evaluate.statistics import Estimate
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.run_folder.best import ACCURACY
from alignkd.run_folder.paths import RunPaths

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskAtEdges:
    """What a run asks its student, the same on all ranks."""

    asked: AskedTask
    student: LiveStudent


def task_accuracy(
    run: Path,
    step: int,
    student: VisionLanguageModel,
    task: TaskAtEdges,
    ranks: Ranks,
    stop: StopRequest,
    alive: Callable[[int], None],
) -> dict[str, float] | None:
    """``accuracy``, on the scale of `alignkd eval`, and its standard error if there is one, by the names of
    metrics rows, on all ranks alike. Answers go to ``answers.jsonl`` of ``run``.

    None, with a line in the log, when a rank cannot answer or is told to stop. ``alive`` is called with the
    number of each round, in which a rank answers one batch or, where none is left, waits. Collective.
    """
    devices = [] if ranks.device.type == "cpu" else [ranks.device]
    with torch.random.fork_rng(devices), own_linear():
        model = task.student(student)
        work = task.asked.work(model, RunPaths(run).answers, f"{run.name}, step {step}", ranks)
        answers = _all_answers(answers_by_batch(model, work, work.batches()), work, ranks, stop, alive)
        del model
    get_accelerator().empty_cache()  # or the blocks of the cache would lie between those of the training
    if answers is None:
        return None
    found: list[Estimate] = []
    try:
        ranks.run_on_rank0(lambda: found.append(task.asked.score(work, answers)))
    except (UserError, FileSystemError) as error:
        log.warning("warning: no accuracy at this step: %s", error)
        return None
    score: Estimate = ranks.broadcast_object(found[0] if found else None)
    values = {ACCURACY: score.value}
    if score.standard_error is not None:
        values[f"{ACCURACY}_standard_error"] = score.standard_error
    return values


def _all_answers(
    batches: Generator[dict[int, str]],
    work: Work,
    ranks: Ranks,
    stop: StopRequest,
    alive: Callable[[int], None],
) -> dict[int, str] | None:
    """Of all ranks. They agree before each round whether to continue."""
    answers: dict[int, str] = {}
    problem: AlignkdError | None = None
    with contextlib.closing(batches):
        for number in range(work.rounds + 1):
            alive(number)
            told = stop.usr1 or stop.term
            stopped, failed = ranks.sum_on_host([int(told), int(problem is not None)])
            if stopped:
                log.info("the questions are given up: the run has been told to stop")
                return None
            if failed:
                log.warning("warning: no accuracy at this step: %s", ranks.shared_error(problem))
                return None
            problem = _answer_next(batches, answers)
    return {key: text for part in ranks.gather_objects(answers) for key, text in part.items()}


def _answer_next(batches: Iterator[dict[int, str]], answers: dict[int, str]) -> AlignkdError | None:
    """Why this rank cannot answer its next batch, if it has one."""
    try:
        answers.update(next(batches, {}))
    except AlignkdError as error:  # to raise here would deadlock the other ranks
        return error
    except OutOfMemoryError:
        return TrainingError("out of memory while the student answered")
    return None
