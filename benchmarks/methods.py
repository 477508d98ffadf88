"""Ways to run one distillation step: the product's, variants of it that each lack one optimisation, and two
references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from alignkd.data.batch import Batch
from alignkd.distributed.ranks import Ranks
from alignkd.engine import student_step
from alignkd.engine.optimizer_step import StepInfo, run_optimizer_step
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.attention import plain_attention_loss
from alignkd.losses.logits import plain_logit_losses
from alignkd.losses.total import TERMS
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.teacher.targets import TeacherModel
from benchmarks.measure import Edge
from benchmarks.references import floor, stand_in
from benchmarks.setting import DISTILLATION, FORWARD_KL, CacheForm, Setting, Sums, total_counts


@dataclass(frozen=True)
class Method:
    """``step`` runs one optimizer step on a window and returns the terms' sums."""

    step: Callable[[Setting, Sequence[Batch]], Sums]
    packing: bool = True
    token_budget: bool = False
    cached: CacheForm | None = None  # what batches bring along of the teacher, as from its cache


class PlainEngine:
    """What ``run_optimizer_step`` calls of DeepSpeed's engine: forward and backward, no optimizer."""

    def __init__(self, module: StudentStep, edge: Edge) -> None:
        self.module = module
        self._edge = edge

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: torch.Tensor) -> None:
        self._edge.on_reached()
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_accumulation_steps(self) -> int:
        return 1

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def step(self) -> None:
        pass

    def get_global_grad_norm(self) -> float:
        return 0.0

    def zero_optimization(self) -> bool:
        return True


class ResidentTeacher:
    """A teacher on this device, whole or without its layers."""

    def __init__(self, model: VisionLanguageModel, shares_tower: bool) -> None:
        self.model = TeacherModel(model, DISTILLATION.top_k)
        self.model.shares_tower = shares_tower

    def targets(self, batch: Batch) -> Any:
        return self.model(batch)

    def head_weight(self) -> torch.Tensor:
        return self.model.model.head.weight.detach()


def ours(
    setting: Setting,
    window: Sequence[Batch],
    shares_tower: bool = True,
    lookahead: int | None = None,
    engine: Any = None,
    cached: bool = False,
) -> Sums:
    """The product's optimizer step. ``shares_tower`` is ``distillation.share_vision_tower``; ``engine`` is
    what runs the module, or None for ``setting.module`` without DeepSpeed; ``cached``: the batches hold the
    teacher's answers, as they come from a cache."""
    info = StepInfo(total_counts(window), setting.elements(window), usr1=False, term=False)
    ranks = Ranks(rank=0, world_size=1, device=setting.device, cpu_group=None)
    sums = run_optimizer_step(
        engine or PlainEngine(setting.module, setting.edge),
        ResidentTeacher(setting.parts if cached else setting.teacher, shares_tower),
        list(window),
        info,
        DISTILLATION,
        ranks,
        Stopwatch(),
        lookahead,
    )
    return dict(zip(TERMS, sums.terms, strict=True))


def _with_plain(fused: str, plain: Callable[..., Any]) -> Method:
    """The product's step with one of its fused losses replaced by the plain form, left to autograd."""

    def step(setting: Setting, window: Sequence[Batch]) -> Sums:
        with patch.object(student_step, fused, plain):
            return ours(setting, window)

    return Method(step)


def _cached_top_k(setting: Setting, window: Sequence[Batch]) -> Sums:
    """With forward KL, the only divergence that this form allows. It is left out of the sums, since the
    other methods have another one."""
    module = StudentStep(setting.student, setting.module.adapters, FORWARD_KL)
    sums = ours(setting, window, cached=True, engine=PlainEngine(module, setting.edge))
    return {name: value for name, value in sums.items() if name != "divergence"}


METHODS: dict[str, Method] = {
    "floor": Method(floor, packing=False),
    "ours": Method(ours),
    "ours, two towers": Method(partial(ours, shares_tower=False)),
    "ours, head not fused": _with_plain("fused_logit_losses", plain_logit_losses),
    "ours, attention term not fused": _with_plain("fused_attention_loss", plain_attention_loss),
    "ours, padded": Method(ours, packing=False),
    "ours, token budget": Method(ours, token_budget=True),
    "ours, padded, token budget": Method(ours, packing=False, token_budget=True),
    "ours, look-ahead 1": Method(partial(ours, lookahead=1)),
    "floor, cached": Method(floor, packing=False, cached="exact"),
    "cached": Method(partial(ours, cached=True), cached="exact"),
    "cached, top-k": Method(_cached_top_k, cached="top_k"),
    "stand-in": Method(stand_in, packing=False),
}
