"""A teacher whose answers are in a cache: the loader brings them along with each micro-batch."""

from __future__ import annotations

import torch

from alignkd.data.batch import Batch
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm_parts import load_parts
from alignkd.teacher.targets import TeacherModel, TeacherTargets


class CachedTeacher:
    """Whole on every rank, but without its layers: see :mod:`alignkd.models.families.mobilevlm_parts`.

    ``weights`` is the fingerprint of the whole teacher. Without ``has_head`` the cache holds the head's
    top-k tokens instead of the hidden states that the head is applied to.
    """

    def __init__(
        self, folder: str, top_k: int, options: BuildOptions, weights: str, has_head: bool = True
    ) -> None:
        self.model = TeacherModel(load_parts(folder, options, has_head), top_k)
        self.weights, self.has_head = weights, has_head

    def targets(self, batch: Batch) -> TeacherTargets:
        cached = batch.teacher_hidden_ND if self.has_head else batch.teacher_tokens_NK
        assert cached is not None, "the loader reads the cache"
        targets: TeacherTargets = self.model(batch)
        return targets

    def head_weight(self) -> torch.Tensor | None:
        if not self.has_head:
            return None
        head = self.model.model.head
        return head.cut(head.weight).detach()
