"""Ask a model the questions of a task: in batches, on one or many ranks, resumed where a killed one stopped.

All ranks form the same batches and take them in turn. A batch that was cut off is answered whole again, since
rounding depends on what is computed together: the answers are those of one rank that was never stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError

from alignkd.data.records import Turn
from alignkd.errors import UserError
from alignkd.evaluate.answer_writer import AnswerWriter, answered_in, merge_answers
from alignkd.evaluate.answering_model import AnsweringModel, Padding, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.tasks.pictures import Picture
from alignkd.evaluate.tasks.task import Question, Task

READERS = 4  # threads that prepare pictures, each a batch ahead

Progress = Callable[[int], None]  # questions answered so far, by this rank


@dataclass(frozen=True)
class Work:
    """One model's answers to one task, and this rank's share of them."""

    task: Task
    questions: list[Question]
    answers: Path  # where the parts of all ranks come together
    name: str  # of the model
    metadata: dict[str, Any]  # what must be equal for a resume
    batch_size: int
    padding: Padding
    rank: int = 0
    ranks: int = 1

    def part(self, rank: int | str) -> Path:
        return self.answers.with_name(f"{self.answers.stem}.part-{rank}.jsonl")

    @property
    def rounds(self) -> int:
        """Batches of the rank that has most."""
        return -(-len(self.questions) // (self.batch_size * self.ranks))

    def batches(self) -> list[range]:
        """Numbers of the questions of each batch of this rank."""
        starts = range(0, len(self.questions), self.batch_size)
        ends = [min(start + self.batch_size, len(self.questions)) for start in starts]
        return [range(*bounds) for bounds in zip(starts, ends, strict=True)][self.rank :: self.ranks]


def is_finished(work: Work) -> bool:
    """Whether all answers are there. Raises UserError when they were made with other settings."""
    done = answered_in(work.answers, work.questions, work.name, work.metadata)
    if done and len(done) < len(work.questions):
        raise UserError(
            f"{work.answers}: holds {len(done)} answers to {len(work.questions)} questions; move it away"
        )
    return bool(done)


def answer_own_share(model: AnsweringModel, work: Work, progress: Progress) -> None:
    """Append this rank's answers to its part, without those that any part has."""
    # An earlier start may have had another number of ranks.
    others = [path for path in _parts(work) if path != work.part(work.rank)]
    done = {number for path in others for number in _answered(path, work)}
    with AnswerWriter(work.part(work.rank), work.questions, work.name, work.metadata) as writer:
        done |= writer.done
        own = work.batches()
        finished = sum(number in done for batch in own for number in batch)
        progress(finished)
        waiting = [batch for batch in own if not done.issuperset(batch)]
        try:
            for answers in answers_by_batch(model, work, waiting):
                new = {number: text for number, text in answers.items() if number not in done}
                writer.write(new)
                finished += len(new)
                progress(finished)
        except OutOfMemoryError:
            raise UserError(
                f"out of memory with --batch-size {work.batch_size}; valid: a smaller one, into another "
                "--out, since answers of a file share their settings"
            ) from None


def answers_by_batch(
    model: AnsweringModel, work: Work, batches: Iterable[range]
) -> Generator[dict[int, str]]:
    """Question number -> answer, of one batch after the other. Raises UserError for an unusable picture."""
    decoding = Decoding(work.task.max_new_tokens)
    for batch, requests in _read_ahead(batches, lambda batch: _requests(model, work, batch)):
        yield dict(zip(batch, model.answers(requests, decoding), strict=True))


def merge_parts(work: Work) -> None:
    """Join the parts in the order of the questions, once all ranks are done."""
    parts = _parts(work)
    if parts:
        merge_answers(parts, len(work.questions), work.answers)
        remove_parts(work)


def remove_parts(work: Work) -> None:
    for path in _parts(work):
        path.unlink(missing_ok=True)


def _parts(work: Work) -> list[Path]:
    return sorted(work.answers.parent.glob(work.part("*").name))


def _answered(path: Path, work: Work) -> set[int]:
    return answered_in(path, work.questions, work.name, work.metadata)


def _requests(model: AnsweringModel, work: Work, batch: range) -> list[Request]:
    pixels: dict[Picture, Any] = {}
    requests = []
    for number in batch:
        question = work.questions[number]
        for picture in question.pictures:
            if picture not in pixels:
                pixels[picture] = model.prepare(picture, work.padding)
        turns = (*question.earlier, Turn("human", question.prompt))
        requests.append(Request(turns, tuple(pixels[picture] for picture in question.pictures)))
    return requests


def _read_ahead(
    batches: Iterable[range], read: Callable[[range], list[Request]]
) -> Iterator[tuple[range, Sequence[Request]]]:
    """Batches with their requests, in order, while the next ones are being read."""
    waiting: deque[tuple[range, Future[list[Request]]]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(read, batch)))
            if len(waiting) > READERS:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
