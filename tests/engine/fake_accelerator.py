"""Optimizer steps on an accelerator that exists in name only, in a process of its own.

torch registers the device ``fakegpu``; fake tensors on it have shapes, dtypes and places, and no values. An
operation on tensors of two places fails there, and so does every question for a value, for which a host would
wait for a real device. The last line of the output is a JSON object: what went wrong, by scenario.

Gradient checkpointing aborts on such a device (torch 2.13); ``test_no_waiting`` has it on ``meta``.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.initialization import no_init_weights

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch, TermCounts
from alignkd.distributed.ranks import Ranks
from alignkd.engine.optimizer_step import StepInfo, run_optimizer_step
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import element_counts
from alignkd.models import attention
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel
from tests import tiny
from tests.engine.plain_engine import PlainEngine, ResidentTeacher
from tests.engine.spy import PLAIN, plain_losses
from tests.engine.test_no_waiting import BlockingCopies

CASES = (("v1", "rounds", "text"), ("text",), ("plain",), ())  # the last micro-batch has no sample


class Scenario(NamedTuple):
    packing: bool = True
    kernel: bool = False  # the variable-length kernel, in bf16
    shares_tower: bool = True
    lookahead: int | None = None
    fused: bool = True
    trains_tower: bool = False
    distils: bool = True
    fault: str | None = None


SCENARIOS = {
    "packed": Scenario(),
    "padded": Scenario(packing=False),
    "kernel": Scenario(kernel=True),
    "own towers": Scenario(shares_tower=False, lookahead=1),
    "padded, own towers": Scenario(packing=False, shares_tower=False, lookahead=2),
    "trained tower": Scenario(shares_tower=False, trains_tower=True),
    "plain losses": Scenario(fused=False),
    "no teacher": Scenario(distils=False),
}
FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda value: value.sum().item(),
    "if": lambda value: bool(value.any()),
    "tolist": lambda value: value.tolist(),
    "nonzero": lambda value: value.nonzero(),
    "mask": lambda value: value[value > 0],
    "a host tensor": lambda value: value + torch.ones(4),
    "an index on the host": lambda value: value.index_select(0, torch.tensor([1])),
    "to the host": lambda value: value.cpu(),
    "from the host": lambda value: value + torch.ones(4).to(value.device),
}


def main() -> None:
    _setup_privateuseone_for_python_backend("fakegpu")
    scenarios = SCENARIOS | {f"fault: {name}": Scenario(fault=name) for name in FAULTS}
    with patch.object(nn.functional, "scaled_dot_product_attention", _any_attention):
        found = {name: _problem(scenario) for name, scenario in scenarios.items()}
    print(json.dumps(found), flush=True)
    os._exit(0)  # backward's thread of the device that is none aborts a regular exit


def _any_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """In the place of SDPA, which has no kernel for such a device: the right shape, place and graph."""
    return query + 0.0 * (key.sum() + value.sum())


def _problem(scenario: Scenario) -> str | None:
    """What went wrong in a step, if anything."""
    models, copies = _models_on_meta(scenario), BlockingCopies()
    batches = [tiny.batch_of(*of_batch, packing=scenario.packing) for of_batch in CASES]
    try:
        with _parts(scenario), FakeTensorMode() as mode, copies:
            _step(scenario, *models, [batch._mapped(mode.from_tensor) for batch in batches])
    except Exception:
        return traceback.format_exc()
    return "; ".join(copies.found) or None


def _models_on_meta(scenario: Scenario) -> tuple[TeacherModel, StudentStep]:
    distillation = DistillationSection(temperature=2.0, enabled=scenario.distils)
    teacher_config, student_config = read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT)
    with torch.device("meta"), no_init_weights():
        teacher = TeacherModel(MobileVLM(teacher_config), distillation.top_k)
        student = MobileVLM(student_config)
        adapters = AlignmentAdapters(teacher_config, student_config) if scenario.distils else None
    if scenario.trains_tower:
        student.unfreeze_vision_tower()
    teacher.shares_tower = scenario.shares_tower
    return teacher, StudentStep(student, adapters, distillation)


def _step(scenario: Scenario, teacher: TeacherModel, module: StudentStep, window: list[Batch]) -> None:
    """``window`` is on the host, as the loader makes it."""
    device, dtype = torch.device("fakegpu"), torch.bfloat16 if scenario.kernel else torch.float32
    for model in (teacher, module):
        _move(model, device, dtype)
    counts = sum((batch.counts for batch in window), start=TermCounts())
    sums = run_optimizer_step(
        PlainEngine(module),
        ResidentTeacher(teacher) if scenario.distils else None,
        window,
        StepInfo(counts, element_counts(counts, module.sizes()), usr1=False, term=False),
        DistillationSection(temperature=2.0, enabled=scenario.distils),
        Ranks(0, 1, device, None),
        Stopwatch(),
        scenario.lookahead,
    )
    assert sums.terms.device.type == device.type
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, missing
    places = {gradient.device for gradient in gradients.values() if gradient is not None}
    assert places == {sums.terms.device}, places


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Fake parameters and buffers on ``device`` in the place of those on ``meta``."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                part._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


@contextmanager
def _parts(scenario: Scenario) -> Iterator[None]:
    """Patches for the losses' form, the kernel, and a fault in the student's forward."""
    with ExitStack() as stack:
        stack.enter_context(plain_losses(() if scenario.fused else tuple(PLAIN)))
        if scenario.kernel:
            stack.enter_context(patch.object(attention, "has_varlen_kernel", lambda *_: True))
        if scenario.fault is not None:
            forward, fault = StudentStep.forward, FAULTS[scenario.fault]

            def faulty(*arguments: Any) -> Any:
                output = forward(*arguments)
                fault(output.sums[:4])
                return output

            stack.enter_context(patch.object(StudentStep, "forward", faulty))
        yield


if __name__ == "__main__":
    main()
