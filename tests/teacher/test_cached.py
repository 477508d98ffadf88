"""A teacher whose most likely tokens are cached has no head, and its targets are what the batch brings."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.teacher.cached import CachedTeacher
from alignkd.teacher.lookahead import targets_ahead
from alignkd.teacher.targets import TeacherModel
from tests import tiny

FP32 = BuildOptions(torch.float32)


def test_targets_are_the_tokens_of_each_micro_batch_and_the_other_terms_of_the_whole_teacher() -> None:
    batches = []
    for number, name in enumerate(("v1", "text", "rounds")):
        batch = tiny.batch_of(name)
        tokens_NK = torch.arange(3 * batch.counts.logits, dtype=torch.int32).reshape(-1, 3) + 100 * number
        batches.append(
            replace(
                batch, teacher_tokens_NK=tokens_NK, teacher_log_probs_NR=torch.randn(len(tokens_NK), 4).half()
            )
        )
    teacher = CachedTeacher(str(tiny.TEACHER), 16, FP32, "weights", has_head=False)
    assert teacher.head_weight() is None
    names = [name for name, _ in teacher.model.named_parameters()]
    assert not any("head" in name for name in names)
    whole = TeacherModel(load_model(tiny.TEACHER, FP32), 16)
    for batch, targets in zip(batches, targets_ahead(teacher, batches, None, nullcontext()), strict=True):
        expected = whole(batch)
        assert targets.top is not None
        assert targets.top.tokens_NK.equal(batch.teacher_tokens_NK)
        assert targets.top.log_probs_NR.equal(batch.teacher_log_probs_NR)
        assert len(targets.hidden_ND) == 0
        torch.testing.assert_close(targets.block_IHMV, expected.block_IHMV)
        torch.testing.assert_close(targets.vision_tokens_IVD, expected.vision_tokens_IVD)
