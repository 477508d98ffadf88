"""How many forwards of the teacher an optimizer step takes, and when."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from alignkd.data.batch import Batch
from alignkd.losses.vision import focus_indices, vision_loss_sums
from alignkd.teacher.lookahead import split_targets, targets_ahead
from alignkd.teacher.targets import TeacherTargets
from tests import tiny

TEXTS = [tiny.batch_of(*["text"] * count, packing=True) for count in (1, 2, 1, 3, 1)]


class CountingTeacher:
    """Its targets are the labels. ``forwards``: the samples of each forward."""

    def __init__(self) -> None:
        self.forwards: list[int] = []

    def targets(self, batch: Batch) -> TeacherTargets:
        self.forwards.append(batch.sample_count)
        no_image = torch.zeros(0, 1, 0, 144)
        return TeacherTargets(
            hidden_ND=batch.logit_labels_N[:, None],
            block_IHMV=no_image,
            vision_tokens_IVD=no_image[:, 0],
            focus_indices_IK=no_image[:, 0, :, 0],
        )


@pytest.mark.parametrize(
    ("lookahead", "forwards"),
    [(None, [8]), (1, [1, 2, 1, 3, 1]), (2, [3, 4, 1]), (5, [8]), (9, [8])],
)
def test_one_forward_serves_as_many_micro_batches_as_configured(
    lookahead: int | None, forwards: list[int]
) -> None:
    teacher = CountingTeacher()
    watch = contextlib.nullcontext()
    found = list(targets_ahead(cast(Any, teacher), TEXTS, lookahead, watch))
    assert teacher.forwards == forwards
    for targets, batch in zip(found, TEXTS, strict=True):
        assert targets.hidden_ND[:, 0].equal(batch.logit_labels_N)


def test_a_forward_runs_when_the_first_of_its_micro_batches_is_asked_for() -> None:
    teacher = CountingTeacher()
    ahead = targets_ahead(cast(Any, teacher), TEXTS, 2, contextlib.nullcontext())
    seen = []
    for _ in ahead:
        seen.append(len(teacher.forwards))
    assert seen == [1, 1, 2, 2, 3]


def test_indices_that_fill_up_a_small_image_stay_inside_its_micro_batch() -> None:
    """The joint batch has images of 6, 2 and 3 vision tokens; the last two are a micro-batch of their own."""
    filled_IV = torch.arange(6)[None] < torch.tensor([[6], [2], [3]])
    block_IHMV = (torch.tensor([[1.0, 6, 2, 5, 3, 4]] * 3) * filled_IV)[:, None, None]
    text_rows_IM = torch.zeros(3, 1, dtype=torch.int64)
    joint = TeacherTargets(
        hidden_ND=torch.zeros(0, 1),
        block_IHMV=block_IHMV,
        vision_tokens_IVD=torch.arange(18.0).reshape(3, 6, 1) * filled_IV[..., None],
        # Any of the equal scores of the columns that an image does not have.
        focus_indices_IK=torch.tensor([[1, 3, 5, 4], [1, 0, 5, 4], [1, 2, 0, 5]]),
    )
    batches = [
        SimpleNamespace(
            image_count=len(rows), counts=SimpleNamespace(logits=0), columns_IV=rows, text_rows_IM=rows[:, :1]
        )
        for rows in (torch.zeros(1, 6), torch.zeros(2, 3))
    ]
    large, small = split_targets(joint, cast(Any, batches))
    assert large.focus_indices_IK.tolist() == [[1, 3, 5, 4]]
    assert small.focus_indices_IK.tolist() == [[1, 0, 2], [1, 2, 0]]
    # As if the micro-batch had had a forward of its own.
    filled_IV, student_IVD = filled_IV[1:, :3], torch.ones(2, 3, 1)
    alone = focus_indices(block_IHMV[1:, ..., :3], 4, filled_IV)
    sums = [
        vision_loss_sums(small.vision_tokens_IVD, student_IVD, indices, text_rows_IM[1:], filled_IV)
        for indices in (alone, small.focus_indices_IK)
    ]
    assert sums[0] == sums[1]
