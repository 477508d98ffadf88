"""Where the teacher runs: sharded by ZeRO-3, or as a whole copy on every rank. Or elsewhere and earlier: see
:mod:`alignkd.teacher.cached`."""

from __future__ import annotations

from typing import Any, Protocol

import deepspeed
import torch

from alignkd.data.batch import Batch
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel, TeacherTargets


class Teacher(Protocol):
    model: TeacherModel

    def targets(self, batch: Batch) -> TeacherTargets:
        """One forward of the frozen model. Collective when sharded, whatever the batch holds."""
        ...

    def head_weight(self) -> torch.Tensor | None:
        """The whole head [vocab, D_T], for one optimizer step; None where its results are cached. Collective
        when sharded."""
        ...


def held_bytes(teacher: Teacher) -> dict[str, int]:
    """Bytes of the teacher on this rank: between steps on the device (``shard``) and, with CPU offload, in
    host memory (``host``); and what its whole head adds on the device (``head``)."""
    parameters: list[Any] = list(teacher.model.parameters())
    if not isinstance(teacher, ShardedTeacher):
        return {"shard": sum(p.numel() * p.element_size() for p in parameters), "host": 0, "head": 0}
    head: Any = teacher.model.model.head.weight
    size = head.element_size()
    # Small parameters, which ZeRO-3 keeps whole on top of their shards; all others are empty between steps.
    resident = sum(p.numel() for p in parameters) * size
    shards = {"cpu": 0, "device": 0}
    for parameter in parameters:
        in_host = teacher.in_host_memory and parameter.ds_tensor.device.type == "cpu"
        shards["cpu" if in_host else "device"] += parameter.ds_tensor.numel() * size
    return {"shard": shards["device"] + resident, "host": shards["cpu"], "head": head.ds_numel * size}


class ReplicatedTeacher:
    def __init__(self, folder: str, top_k: int, options: BuildOptions) -> None:
        self.model = TeacherModel(load_model(folder, options), top_k)

    def targets(self, batch: Batch) -> TeacherTargets:
        targets: TeacherTargets = self.model(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        head = self.model.model.head
        return head.cut(head.weight).detach()


class ShardedTeacher:
    """ZeRO-3 through ``deepspeed.initialize`` without an optimizer, since ``init_inference`` ignores its
    ``zero`` section. The ranks of ``options.group`` share one set of shards, on the device or, with
    ``offload_param``, in host memory. ``keep_head``: gather the head once, not once per optimizer step."""

    def __init__(self, folder: str, top_k: int, options: BuildOptions, *, keep_head: bool = False) -> None:
        self.model = TeacherModel(load_model(folder, options), top_k)
        self.keep_head = keep_head
        self.kept_head: torch.Tensor | None = None
        assert options.zero3 is not None
        self.in_host_memory = "offload_param" in options.zero3["zero_optimization"]
        self.engine = deepspeed.initialize(model=self.model, config=options.zero3)[0]
        self.model.model.restore_buffers(options.device)
        self.engine.eval()

    def targets(self, batch: Batch) -> TeacherTargets:
        targets: TeacherTargets = self.engine(batch)
        return targets

    def head_weight(self) -> torch.Tensor:
        if self.kept_head is not None:
            return self.kept_head
        head = self._gather_head()
        self.kept_head = head if self.keep_head else None
        return head

    def _gather_head(self) -> torch.Tensor:
        # A copy, because the parameter is partitioned again when the context ends, and the student's losses
        # need it until the last backward of the optimizer step.
        head = self.model.model.head
        with deepspeed.zero.GatheredParameters([head.weight]):
            return head.cut(head.weight).detach().clone()
