"""Predicted activations and targets against the tensors of real modules, on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alignkd.config.schema import DistillationSection, LoraSection, TrainingSection
from alignkd.data.batch import Batch
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.engine.student_step import StudentStep
from alignkd.losses import attention, fused_logits
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.lora import add_lora
from alignkd.teacher.targets import TeacherModel
from benchmarks.measure import LiveBytes
from launcher.plan import activations
from launcher.plan.shapes import ModelShapes, mobilevlm_shapes
from launcher.plan.trained import Trained
from launcher.plan.workload import Workload
from tests import tiny

# The fixture's tower with a language model that outweighs it.
STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
TEACHER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 8}


def model_of(folder: Any, dtype: torch.dtype, shape: dict[str, int]) -> MobileVLM:
    heads = shape["num_attention_heads"]
    config = dataclasses.replace(read_model_config(folder), num_key_value_heads=heads, **shape)
    model = MobileVLM(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def worst_batch(samples: int, length: int) -> Batch:
    """The batch that a plan assumes: samples of one length, one image first, all text supervised."""
    text = length - 145
    example = Example([1, -200, *[5] * text], [-100, -100, *[5] * text], (torch.zeros(3, 336, 336),))
    return collate([example] * samples, CollateSettings(144, (3, 336, 336), packing=True))


def storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in values if isinstance(value, torch.Tensor)}


FP32, BF16 = torch.float32, torch.bfloat16


ALL, PROJECTOR, LORA = Trained(), Trained(language_model=False), Trained(language_model=False, lora_rank=8)


@pytest.mark.parametrize(
    ("dtype", "every", "trained"),
    [
        (FP32, None, ALL),
        (FP32, 1, ALL),
        (BF16, None, ALL),
        (BF16, 1, ALL),
        (BF16, 2, ALL),
        (FP32, None, PROJECTOR),
        (BF16, None, PROJECTOR),
        (BF16, None, LORA),
        (BF16, 2, LORA),
    ],
    ids=str,
)
def test_kept_activations_and_peaks_agree_with_real_modules(
    dtype: torch.dtype, every: int | None, trained: Trained
) -> None:
    torch.manual_seed(0)
    student, model = model_of(tiny.STUDENT, dtype, STUDENT), model_of(tiny.TEACHER, dtype, TEACHER)
    ours, theirs = mobilevlm_shapes(student.config), mobilevlm_shapes(model.config)
    size = dtype.itemsize
    training = TrainingSection(
        gradient_checkpointing=every is not None, checkpoint_every_nth_layer=every or 1
    )
    checkpointed = activations.checkpointed_layers(training, ours)
    assert checkpointed == {None: 0, 1: 3, 2: 2}[every]
    if every is not None:
        student.enable_gradient_checkpointing(every)
    if trained == PROJECTOR:
        student.freeze_all_but(["projector"])
    if trained == LORA:
        add_lora(student, LoraSection(rank=trained.lora_rank), seed=0)
    adapters = AlignmentAdapters(theirs, ours).to(dtype)
    step = StudentStep(student, adapters, DistillationSection.model_validate({})).train()
    teacher = TeacherModel(model, 16)
    teacher.shares_tower = True
    work = Workload(samples=3, length=400, vision_tokens=144, accumulation=1, window=1)
    batch = worst_batch(work.samples, work.length)

    with LiveBytes() as in_teacher:
        targets = teacher(batch)
    tensors = [value for value in targets if isinstance(value, torch.Tensor)]
    held = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in tensors}
    answer = theirs.hidden_size * size
    predicted = activations.target_bytes(theirs, work, size, answer, shares_tower=True)
    assert sum(held.values()) == pytest.approx(predicted, rel=0.01)
    predicted = activations.teacher_workspace(theirs, work, size, answer, shares_tower=True)
    assert in_teacher.peak == pytest.approx(predicted, rel=0.1)

    known = storages(targets) | storages(vars(batch).values())
    known |= storages([*step.parameters(), *teacher.parameters(), *step.buffers()])
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with LiveBytes() as in_student:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step(batch, (1.0,) * 5, targets, model.head.weight.detach()).loss
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
    predicted = activations.kept_bytes(ours, work, size, trained, checkpointed=checkpointed)
    of_head = activations.head_gradient_bytes(ours) if trained.language_model else 0
    assert kept == pytest.approx(predicted + of_head, rel=0.05)
    # Coarse, and rather too high: these peaks do not coincide, and gradients appear one by one. Without those
    # of the language model's weights, nothing makes up for workspaces that are estimated too low.
    gradients = sum(parameter.grad.nbytes for parameter in step.parameters() if parameter.grad is not None)
    predicted += gradients + student_workspace(ours, work, size, trained, checkpointed)
    most = 1.05 if trained.language_model else 1.15
    assert 0.8 * predicted < in_student.peak < most * predicted


def student_workspace(
    config: ModelShapes, work: Workload, size: int, trained: Trained, checkpointed: int
) -> int:
    return max(
        activations.layer_workspace(config, work, size, trained, checkpointed=checkpointed),
        activations.logits_workspace(config, work, trained),
        activations.block_workspace(config, work, size),
    )


def test_the_chunk_sizes_are_those_of_the_losses() -> None:
    assert activations.POSITIONS_PER_CHUNK == fused_logits.POSITIONS_PER_CHUNK
    assert activations.ROWS_PER_CHUNK == attention.ROWS_PER_CHUNK
