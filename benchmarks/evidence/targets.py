"""The frozen teacher's targets of every training sample, computed once for all runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from alignkd.data.batch import Batch
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel, TeacherTargets
from benchmarks.evidence.loop import VISION_TOKENS, Examples

TEACHER_BATCH = 64
ALL_TOKENS = VISION_TOKENS  # focus indices are kept for every vision token, best first: K is their beginning

Forward = Callable[[TeacherModel, Batch], TeacherTargets]


@dataclass(frozen=True)
class TargetStore:
    """All targets one after the other, and where those of each sample begin (one entry more than samples)."""

    head: torch.Tensor
    joined: TeacherTargets
    position_starts: torch.Tensor  # int64, rows of ``hidden_ND``
    image_starts: torch.Tensor  # int64, rows of the others
    top_k: int = ALL_TOKENS

    def with_top_k(self, top_k: int) -> TargetStore:
        return replace(self, top_k=top_k)

    def of(self, numbers: Sequence[int]) -> TeacherTargets:
        positions, images = (_rows(starts, numbers) for starts in (self.position_starts, self.image_starts))
        return TeacherTargets(
            hidden_ND=self.joined.hidden_ND[positions],
            block_IHMV=self.joined.block_IHMV[images],
            vision_tokens_IVD=self.joined.vision_tokens_IVD[images],
            focus_indices_IK=self.joined.focus_indices_IK[images, : self.top_k],
        )


def standard_forward(teacher: TeacherModel, batch: Batch) -> TeacherTargets:
    targets: TeacherTargets = teacher(batch)
    return targets


def teacher_targets(
    teacher: MobileVLM, examples: Examples, forward: Forward = standard_forward
) -> TargetStore:
    """``forward`` runs the teacher on a batch of several samples."""
    model = TeacherModel(teacher, ALL_TOKENS)
    found: list[TeacherTargets] = []
    positions, images = [0], [0]
    for start in range(0, len(examples.samples), TEACHER_BATCH):
        numbers = range(start, min(start + TEACHER_BATCH, len(examples.samples)))
        batch = examples.batch(numbers)
        found.append(forward(model, batch))
        rows = batch.logit_positions_N // batch.input_ids_BL.shape[1]
        positions += torch.bincount(rows, minlength=len(numbers)).tolist()
        images += [len(examples.samples[number].grids) for number in numbers]
    blocks = [one.block_IHMV for one in found]
    shape = [max(block.shape[axis] for block in blocks) for axis in (2, 3)]
    joined = TeacherTargets(
        hidden_ND=torch.cat([one.hidden_ND for one in found]),
        block_IHMV=torch.cat(
            [F.pad(block, (0, shape[1] - block.shape[3], 0, shape[0] - block.shape[2])) for block in blocks]
        ),
        vision_tokens_IVD=torch.cat([one.vision_tokens_IVD for one in found]),
        focus_indices_IK=torch.cat([one.focus_indices_IK for one in found]),
    )
    head = teacher.head.weight.detach().clone()
    return TargetStore(head, joined, torch.tensor(positions).cumsum(0), torch.tensor(images).cumsum(0))


def _rows(starts: torch.Tensor, numbers: Sequence[int]) -> list[int]:
    bounds = [(int(starts[number]), int(starts[number + 1])) for number in numbers]
    return [row for begin, end in bounds for row in range(begin, end)]
