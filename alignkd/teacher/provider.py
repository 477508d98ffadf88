"""Who gives the teacher's targets: a model sharded by ZeRO-3, or a whole copy on every rank."""

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
    """Bytes of the teacher on this rank outside a step, on the device (``shard``) and in host memory
    (``host``: a shard that was put there), and what its head adds on the device during a step."""
    parameters: list[Any] = list(teacher.model.parameters())
    head: Any = teacher.model.model.head.weight
    if isinstance(teacher, ReplicatedTeacher):
        return {"shard": sum(p.numel() * p.element_size() for p in parameters), "host": 0, "head": 0}
    assert isinstance(teacher, ShardedTeacher)
    size = head.element_size()
    resident = sum(p.numel() for p in parameters) * size  # what ZeRO-3 keeps whole on top of its shard
    shards = {"cpu": 0, "device": 0}
    for parameter in parameters:
        in_host = teacher.in_host_memory and parameter.ds_tensor.device.type == "cpu"
        shards["cpu" if in_host else "device"] += parameter.ds_tensor.numel() * size
    return {"shard": shards["device"] + resident, "host": shards["cpu"], "head": head.ds_numel * size}


class ReplicatedTeacher:
    def __init__(self, folder: str, top_k: int, building: Building) -> None:
        self.model = TeacherModel(load_model(folder, building), top_k)

    def targets(self, batch: Batch) -> TeacherTargets:
        targets: TeacherTargets = self.model(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        return self.model.model.head.weight.detach()


class ShardedTeacher:
    """ZeRO-3 by ``deepspeed.initialize`` without an optimizer; ``init_inference`` ignores its `zero`.

    The shards lie on the ranks of ``building.group``, on the device or, with ``offload_param``, in host
    memory.
    """

    def __init__(self, folder: str, top_k: int, building: Building) -> None:
        self.model = TeacherModel(load_model(folder, building), top_k)
        assert building.zero3 is not None
        self.in_host_memory = "offload_param" in building.zero3["zero_optimization"]
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
