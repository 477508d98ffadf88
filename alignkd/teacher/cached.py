"""A teacher whose hidden states are in a cache: the loader brings them along with each micro-batch."""

from __future__ import annotations

import torch

from alignkd.data.batch import Batch
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm_parts import load_parts
from alignkd.teacher.targets import TeacherModel, TeacherTargets


class CachedTeacher:
    """Whole on every rank, but without its layers: see :mod:`alignkd.models.families.mobilevlm_parts`.

    ``weights`` is the fingerprint of the whole teacher.
    """

    def __init__(self, folder: str, top_k: int, options: BuildOptions, weights: str) -> None:
        self.model = TeacherModel(load_parts(folder, options), top_k)
        self.weights = weights

    def targets(self, batch: Batch) -> TeacherTargets:
        assert batch.teacher_hidden_ND is not None, "the loader reads the cache"
        targets: TeacherTargets = self.model(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        head = self.model.model.head
        return head.cut(head.weight).detach()
