"""How many forwards of the teacher an optimizer step takes, and when."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import pytest
import torch

from alignkd.data.batch import Batch
from alignkd.teacher.lookahead import targets_ahead
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
