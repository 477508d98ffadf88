"""The accuracy of a task at the edge of a step: the student answers its questions, each rank a part of them.

Training goes on as if nothing had been asked: ``evaluate.live_student`` leaves the engine alone, and random
states are kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from torch import OutOfMemoryError

from alignkd.distributed.ranks import Ranks
from alignkd.engine.signals import StopRequest
from alignkd.errors import AlignkdError, FileSystemError, TrainingError, UserError
from alignkd.evaluate.answering import Work, answers_by_batch
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.asked_task import AskedTask
from alignkd.evaluate.live_student import LiveStudent, own_linear
from alignkd.evaluate.statistics import Estimate
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.run_folder.best import ACCURACY
from alignkd.run_folder.paths import RunPaths

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


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
    require_writer: Callable[[], None],
) -> dict[str, float] | None:
    """``accuracy``, on the scale of `alignkd eval`, and its standard error if there is one, by the names of
    metrics rows, on all ranks alike. Answers go to ``answers.jsonl`` of ``run``.

    None, with a line in the log, when a rank cannot answer, whatever it raises, or is told to stop. ``alive``
    is called with the number of rounds done; in each, a rank answers one batch or, where none is left, waits.
    ``require_writer`` raises on rank 0, and so on all, when the run is another process's by the time that the
    answers are there. Collective.
    """
    if not _go_on(None, ranks, stop):
        return None

    def work_of(model: AnsweringModel) -> Work:
        return task.asked.work(model, RunPaths(run).answers, f"{run.name}, step {step}", ranks)

    devices = [] if ranks.device.type == "cpu" else [ranks.device]
    with torch.random.fork_rng(devices), own_linear():
        answered = _answered(lambda: task.student(student), work_of, ranks, stop, alive)
    get_accelerator().empty_cache()  # or the blocks of the cache would lie between those of the training
    if answered is None:
        return None
    work, answers = answered
    found: list[Estimate] = []

    def score() -> None:
        require_writer()
        found.append(task.asked.score(work, answers))

    try:
        ranks.run_on_rank0(score)
    except (UserError, FileSystemError) as error:
        log.warning("warning: no accuracy at this step: %s", error)
        return None
    accuracy: Estimate = ranks.broadcast_object(found[0] if found else None)
    values = {ACCURACY: accuracy.value}
    if accuracy.standard_error is not None:
        values[f"{ACCURACY}_standard_error"] = accuracy.standard_error
    return values


def _answered(
    build: Callable[[], AnsweringModel],
    work_of: Callable[[AnsweringModel], Work],
    ranks: Ranks,
    stop: StopRequest,
    alive: Callable[[int], None],
) -> tuple[Work, dict[int, str]] | None:
    """The answers of all ranks. They agree before each round whether to go on."""
    model, problem = _attempt(build)
    alive(0)
    if not _go_on(problem, ranks, stop):
        return None
    assert model is not None
    work = work_of(model)
    answers: dict[int, str] = {}
    with contextlib.closing(answers_by_batch(model, work, work.batches())) as batches:
        for number in range(1, work.rounds + 1):
            batch, problem = _attempt(lambda: next(batches, None))
            answers |= batch or {}
            alive(number)
            if not _go_on(problem, ranks, stop):
                return None
    return work, {key: text for part in ranks.gather_objects(answers) for key, text in part.items()}


def _go_on(problem: AlignkdError | None, ranks: Ranks, stop: StopRequest) -> bool:
    """Whether all ranks can and may; the log says why not. Collective."""
    told = stop.usr1 or stop.term
    stopped, failed = ranks.sum_on_host([int(told), int(problem is not None)])
    if stopped:
        log.info("the questions are given up: the run has been told to stop")
    elif failed:
        log.warning("warning: no accuracy at this step: %s", ranks.shared_error(problem))
    return not stopped and not failed


def _attempt(work: Callable[[], _Result]) -> tuple[_Result | None, AlignkdError | None]:
    """What ``work`` returns, or why this rank has none. To raise here would deadlock the other ranks."""
    try:
        return work(), None
    except AlignkdError as error:
        return None, error
    except OutOfMemoryError:
        return None, TrainingError("out of memory while the student answered")
    except Exception as error:  # of a processor that does not take a picture, for instance
        log.exception("the student cannot answer")
        return None, TrainingError(f"the student cannot answer: {type(error).__name__}: {error}")
