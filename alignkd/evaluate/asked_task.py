"""The questions of ``evaluation.task``: read once, asked after every so many optimizer steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignkd.config.schema import EvaluationSection
from alignkd.distributed.ranks import Ranks
from alignkd.errors import UserError
from alignkd.evaluate.answer_writer import answer_row
from alignkd.evaluate.answering import Work
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.options import BATCH_SIZE
from alignkd.evaluate.scoring import score_file
from alignkd.evaluate.statistics import Estimate
from alignkd.evaluate.tasks.layout import Layout, require
from alignkd.evaluate.tasks.registry import task_named
from alignkd.evaluate.tasks.task import Question
from alignkd.run_folder.atomic_files import write_text_atomic


@dataclass(frozen=True)
class AskedTask:
    name: str
    data: Path
    questions: list[Question]
    is_partial: bool  # only the first questions of the task
    fingerprint: str  # of the questions and the labels

    def identity(self) -> dict[str, object]:
        """What the accuracy depends on beside the weights."""
        return {"task": self.name, "asked": len(self.questions), "questions": self.fingerprint}

    def work(self, model: AnsweringModel, answers: Path, model_id: str, ranks: Ranks) -> Work:
        """A rank's share. Batches are as large as those of `alignkd eval` or smaller, so that every rank gets
        one; of one question where a model answers one at a time, since a stop waits for the batch."""
        task = task_named(self.name)
        size = min(BATCH_SIZE, -(-len(self.questions) // ranks.world_size)) if model.in_batches else 1
        padding = model.padding_for(None, task.pad_images)
        metadata = {
            "precision": model.precision,
            "batch_size": size,
            "image_padding": padding,
            **model.answer_settings(),
        }
        place = ranks.rank, ranks.world_size
        return Work(task, self.questions, answers, model_id, metadata, size, padding, *place)

    def score(self, work: Work, answers: Mapping[int, str]) -> Estimate:
        """Write the answers of all ranks and score them as `alignkd eval` does. Raises OSError and
        UserError."""
        rows = [
            answer_row(question, number, answers[number], work.name, work.metadata)
            for number, question in enumerate(self.questions)
        ]
        write_text_atomic(work.answers, "".join(json.dumps(row) + "\n" for row in rows), durable=False)
        return score_file(work.task, work.answers, self.data, partial=self.is_partial).score


def asked_task(section: EvaluationSection) -> AskedTask:
    """Raises UserError for an unknown task and for files that are missing."""
    assert section.task is not None
    if section.task_data is None:
        raise UserError("evaluation.task_data is missing")
    task, data = task_named(section.task), Path(section.task_data)
    require([task.layout], data, scoring_only=False)
    every = task.questions(data)
    questions = every[: section.questions]
    fingerprint = fingerprint_of(questions, task.layout, data)
    return AskedTask(task.name, data, questions, len(questions) < len(every), fingerprint)


def fingerprint_of(questions: Sequence[Question], layout: Layout, data: Path) -> str:
    """Of all that the questions ask and of the files that score them (not folders, such as MME's), wherever
    ``data`` lies."""
    digest = hashlib.sha256()
    for question in questions:
        fields = asdict(question)
        for picture in fields["pictures"]:
            picture.pop("folder", None)
            picture.pop("where", None)
        digest.update(json.dumps(fields).encode())
    for needed in layout.needed:
        if needed.for_scoring and not needed.is_folder:
            digest.update(layout.path(data, needed.name).read_bytes())
    return digest.hexdigest()
