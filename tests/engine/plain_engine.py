"""An engine and a teacher without DeepSpeed, for steps in this process."""

from __future__ import annotations

from typing import Any, cast

import torch

from alignkd.data.batch import Batch
from alignkd.engine.student_step import StudentStep
from alignkd.teacher.targets import TeacherModel, TeacherTargets


class PlainEngine:
    """What the step calls of DeepSpeed's engine, configured for two micro-batches; no optimizer."""

    def __init__(self, module: StudentStep) -> None:
        self.module = module
        self.losses: list[torch.Tensor] = []  # detached, as given to backward

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def gradient_accumulation_steps(self) -> int:
        return 2

    def set_gradient_accumulation_boundary(self, _is_last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()

    def zero_optimization(self) -> bool:
        return False

    def bfloat16_enabled(self) -> bool:
        return False

    def fp16_enabled(self) -> bool:
        return False

    def step(self) -> None: ...


class ResidentTeacher:
    """A whole teacher in this process."""

    def __init__(self, model: TeacherModel) -> None:
        self.model = model

    def targets(self, batch: Batch) -> TeacherTargets:
        return cast(TeacherTargets, self.model(batch))

    def head_weight(self) -> torch.Tensor:
        return self.model.model.head.weight.detach()
