"""The host never waits for the device in a step. Shown on torch's ``meta`` device, whose tensors have shapes
and no values: asking for a value, or for a shape that depends on values, fails there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import TermCounts
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo, StepSums, run_optimizer_step
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import element_counts
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel
from tests import tiny
from tests.engine.plain_engine import PlainEngine, ResidentTeacher
from tests.engine.spy import PLAIN, plain_losses

META = torch.device("meta")
aten = torch.ops.aten


class BlockingCopies(TorchDispatchMode):
    """Copies between host and device that block the host (a copy to pinned memory does not)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            source = args[1] if func.overloadpacket is aten.copy_ else args[0]
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.device != result.device and waits:
                self.found.append(f"{func}: {source.device} to {result.device}")
        return result


def step_on_meta(
    distillation: DistillationSection, packing: bool, *, shares_tower: bool, lookahead: int | None
) -> StepSums:
    """A window of all kinds of micro-batches, one of them without a sample."""
    cases = (("v1", "rounds", "text"), ("text",), ("plain",), ())
    window = [tiny.batch_of(*of_batch, packing=packing) for of_batch in cases]
    with META:
        teacher_config, student_config = read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT)
        teacher = TeacherModel(MobileVLM(teacher_config), distillation.top_k)
        student = MobileVLM(student_config)
        student.enable_gradient_checkpointing()
        module = StudentStep(student, AlignmentAdapters(teacher_config, student_config), distillation)
    teacher.shares_tower = shares_tower
    counts = sum((batch.counts for batch in window), start=TermCounts())
    info = StepInfo(counts, element_counts(counts, module.sizes()), usr1=False, term=False)
    return run_optimizer_step(
        PlainEngine(module),
        ResidentTeacher(teacher),
        window,
        info,
        distillation,
        Ranks(0, 1, META, None),
        Stopwatch(),
        lookahead,
    )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("fused", "shares_tower", "lookahead"), [(True, True, None), (False, False, 1), (True, True, 2)]
)
def test_a_step_asks_nothing_of_the_device(
    packing: bool, fused: bool, shares_tower: bool, lookahead: int | None
) -> None:
    distillation = DistillationSection(temperature=2.0)
    with plain_losses(() if fused else tuple(PLAIN)), BlockingCopies() as copies:
        sums = step_on_meta(distillation, packing, shares_tower=shares_tower, lookahead=lookahead)
    assert sums.terms.device == META
    assert isinstance(sums.gradient_norm, torch.Tensor)
    assert sums.gradient_norm.device == META
    assert copies.found == []


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda value: value.sum().item(),
    "if": lambda value: bool(value.any()),
    "tolist": lambda value: value.tolist(),
    "nonzero": lambda value: value.nonzero(),
    "mask": lambda value: value[value > 0],
    "where": lambda value: torch.where(value > 0),
    "unique": lambda value: value.unique(),
    "to the host": lambda value: value.cpu(),
    "from the host": lambda value: value + torch.arange(4).to(META),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_waiting_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to wait, inserted into the student's forward."""
    forward = StudentStep.forward

    def waiting(*arguments: Any) -> Any:
        output = forward(*arguments)
        WAITS[name](output.sums[:4])
        return output

    monkeypatch.setattr(StudentStep, "forward", waiting)
    found: list[str] = []
    try:
        with BlockingCopies() as copies:
            step_on_meta(DistillationSection(), True, shares_tower=True, lookahead=None)
        found = copies.found
    except (RuntimeError, NotImplementedError) as error:
        found = [str(error)]
    assert found


def test_a_step_without_distillation_asks_nothing_of_the_device() -> None:
    off = DistillationSection(enabled=False)
    with META:
        module = StudentStep(MobileVLM(read_model_config(tiny.STUDENT)), None, off)
    window = [tiny.batch_of("v1", "text", packing=True)]
    counts = window[0].counts
    info = StepInfo(counts, element_counts(counts, module.sizes()), usr1=False, term=False)
    with BlockingCopies() as copies:
        run_optimizer_step(
            PlainEngine(module), None, window, info, off, Ranks(0, 1, META, None), Stopwatch(), None
        )
    assert copies.found == []


def test_ranks_use_neither_tf32_nor_the_attention_of_cudnn(one_rank: Any) -> None:
    settings = SimpleNamespace(matmul="highest", convolutions=False, cudnn_attention=False)
    assert one_rank.run(backend_settings) == [settings]


def backend_settings(_ranks: Ranks) -> SimpleNamespace:
    return SimpleNamespace(
        matmul=torch.get_float32_matmul_precision(),
        convolutions=torch.backends.cudnn.allow_tf32,
        cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled(),
    )
