"""Who gives the teacher's targets: sharded over all ranks by ZeRO-3, or a whole copy on every rank."""

from __future__ import annotations

from typing import Any, Protocol

import deepspeed
import torch

from alignkd.data.batch import Batch
from alignkd.models.loading import Building, load_model, restore_buffers
from alignkd.teacher.targets import TeacherModel, TeacherTargets


class Teacher(Protocol):
    model: TeacherModel

    def targets(self, batch: Batch) -> TeacherTargets:
        """Run the frozen model once. Collective when sharded: every rank joins, whatever its batch holds."""
        ...

    def head_weight(self) -> torch.Tensor:
        """The whole head [vocab, D_T], to be held for one optimizer step. Collective when sharded."""
        ...


def held_bytes(teacher: Teacher) -> dict[str, int]:
    """Bytes of the teacher on this rank outside a step (``shard``), and what its head adds during one."""
    parameters: list[Any] = list(teacher.model.parameters())
    head: Any = teacher.model.model.head.weight
    if isinstance(teacher, ReplicatedTeacher):
        return {"shard": sum(p.numel() * p.element_size() for p in parameters), "head": 0}
    shard = sum(p.ds_tensor.numel() + p.numel() for p in parameters)  # p itself: what stays resident
    return {"shard": shard * head.element_size(), "head": head.ds_numel * head.element_size()}


class ReplicatedTeacher:
    def __init__(self, folder: str, top_k: int, building: Building) -> None:
        self.model = TeacherModel(load_model(folder, building), top_k)

    def targets(self, batch: Batch) -> TeacherTargets:
        targets: TeacherTargets = self.model(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        return self.model.model.head.weight.detach()


class ShardedTeacher:
    """ZeRO-3 by ``deepspeed.initialize`` without an optimizer; ``init_inference`` ignores its `zero`."""

    def __init__(self, folder: str, top_k: int, building: Building) -> None:
        self.model = TeacherModel(load_model(folder, building), top_k)
        self.engine = deepspeed.initialize(model=self.model, config=building.zero3)[0]
        restore_buffers(self.model.model, building.device)
        self.engine.eval()

    def targets(self, batch: Batch) -> TeacherTargets:
        targets: TeacherTargets = self.engine(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        # A copy, because the parameter goes back to its shards when the context ends, while the student's
        # losses need the weight until the last backward of the optimizer step.
        with deepspeed.zero.GatheredParameters([self.model.model.head.weight]):
            return self.model.model.head.weight.detach().clone()
