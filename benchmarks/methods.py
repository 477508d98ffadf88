"""Ways to make one distillation step, each a function of a batch that returns the losses of the step.

``floor``: what no method can leave out. The frozen teacher's forward and the student's forward and backward,
both with fused attention, one vision tower, cross-entropy and KL at the supervised positions by the product's
fused head; none of the alignment terms. ``ours``: the product's optimizer step as it is configured by
default, all terms on; and without one of its devices at a time. ``stand-in``: the usual way, attention maps
of all layers, fp32 logits at all positions, two towers. Samples are padded to the longest but in ``ours``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import Batch
from alignkd.engine.optimizer_step import WindowFacts, run_optimizer_step
from alignkd.engine.ranks import Ranks
from alignkd.engine.stopwatch import Stopwatch
from alignkd.engine.student_step import StudentStep
from alignkd.losses.alignment import attention_loss_sum, focus_indices, vision_loss_sums
from alignkd.losses.logits import LogitTargets, divergence_sum
from alignkd.losses.terms import TERMS, element_counts, term_scales, term_weights
from alignkd.models.adapters import seeded_adapters
from alignkd.models.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel
from benchmarks.batches import Samples
from benchmarks.measure import Edge

DISTILLATION = DistillationSection.model_validate({})  # all terms, the paper's K and lambda
Losses = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """The models that all methods share, and the moment that memory is read at."""

    teacher: MobileVLM
    student: MobileVLM
    module: StudentStep  # student and adapters
    edge: Edge
    device: torch.device

    def known(self) -> list[torch.Tensor]:
        models = (self.teacher, self.module)
        return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]

    def forget_gradients(self) -> None:
        self.module.zero_grad(set_to_none=True)


def new_setting(teacher: MobileVLM, student: MobileVLM, device: torch.device) -> Setting:
    adapters = seeded_adapters(teacher.config, student.config, seed=0)
    module = StudentStep(student, adapters.to(device, student.head.weight.dtype), DISTILLATION)
    return Setting(teacher.eval().requires_grad_(False), student.train(), module, Edge(), device)


class PlainEngine:
    """What ``run_optimizer_step`` asks of a DeepSpeed engine, without its optimizer: forward and backward."""

    def __init__(self, setting: Setting) -> None:
        self.module = setting.module
        self._edge = setting.edge

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
    """A whole teacher on this device."""

    def __init__(self, model: MobileVLM, shares_tower: bool) -> None:
        self.model = TeacherModel(model, DISTILLATION.top_k)
        self.model.shares_tower = shares_tower

    def targets(self, batch: Batch) -> Any:
        return self.model(batch)

    def head_weight(self) -> torch.Tensor:
        return self.model.model.head.weight.detach()


def ours(setting: Setting, samples: Samples) -> Losses:
    return _step(setting, samples.packed)


def padded(setting: Setting, samples: Samples) -> Losses:
    """``training.packing: false``."""
    return _step(setting, samples.padded)


def two_towers(setting: Setting, samples: Samples) -> Losses:
    """``distillation.share_vision_tower: false``."""
    return _step(setting, samples.packed, shares_tower=False)


def _step(setting: Setting, batch: Batch, shares_tower: bool = True) -> Losses:
    sizes = setting.module.sizes()
    facts = WindowFacts(batch.counts, element_counts(batch.counts, sizes), usr1=False, term=False)
    ranks = Ranks(rank=0, world_size=1, device=setting.device, cpu_group=None)
    sums = run_optimizer_step(
        PlainEngine(setting),
        ResidentTeacher(setting.teacher, shares_tower),
        [batch],
        facts,
        DISTILLATION,
        ranks,
        Stopwatch(),
    )
    return _means(sums.terms.tolist(), batch, setting)


def floor(setting: Setting, samples: Samples) -> Losses:
    batch = samples.padded
    teacher, student = setting.teacher, setting.student
    patches_IPC = _patches(student, batch)
    with torch.no_grad():
        teacher_hidden = _hidden(teacher, batch, teacher.projector(patches_IPC))
        teacher_ND = teacher_hidden.flatten(0, 1)[batch.logit_positions_N]
        del teacher_hidden
    hidden_BLD = _hidden(student, batch, student.projector(patches_IPC))
    targets = LogitTargets(
        batch.logit_labels_N, teacher_hidden_ND=teacher_ND, teacher_weight_WD=teacher.head.weight.detach()
    )
    sums = student.head(hidden_BLD.flatten(0, 1)[batch.logit_positions_N], targets)
    del hidden_BLD, patches_IPC, teacher_ND, targets
    return _backward({"ce": sums[0], "divergence": sums[1]}, batch, setting)


def stand_in(setting: Setting, samples: Samples) -> Losses:
    batch = samples.padded
    teacher, student = setting.teacher, setting.student
    adapters = setting.module.adapters
    assert adapters is not None
    with _eager(teacher), _eager(student):
        with torch.no_grad():
            teacher_tokens = teacher.projector(_patches(teacher, batch))
            teacher_output = _run(teacher, batch, teacher_tokens, output_attentions=True)
            teacher_logits = teacher.head(teacher_output.last_hidden_state).float()
        tokens = student.projector(_patches(student, batch))
        output = _run(student, batch, tokens, output_attentions=True)
    logits_BLW = student.head(output.last_hidden_state).float()
    log_student = logits_BLW.log_softmax(dim=-1).flatten(0, 1)[batch.logit_positions_N]
    log_teacher = teacher_logits.log_softmax(dim=-1).flatten(0, 1)[batch.logit_positions_N]
    teacher_block = _cut_block(teacher_output.attentions[0], batch, teacher.config.vision_tokens)
    block = _cut_block(output.attentions[0], batch, student.config.vision_tokens)
    rows_IM = batch.text_rows_IM
    focus = focus_indices(teacher_block, DISTILLATION.top_k)
    vision_all, vision_focus = vision_loss_sums(adapters.vision, teacher_tokens, tokens, focus, rows_IM)
    terms = {
        "ce": F.nll_loss(log_student, batch.logit_labels_N, reduction="sum"),
        "divergence": divergence_sum(log_student, log_teacher, "reverse_kl"),
        "attention": attention_loss_sum(adapters.attention, teacher_block.to(tokens.dtype), block, rows_IM),
        "vision_all": vision_all,
        "vision_focus": vision_focus,
    }
    # The maps of all layers are results of the two forward passes, alive until the step is over.
    losses = _backward(terms, batch, setting)
    del teacher_output, output
    return losses


def _backward(terms: dict[str, torch.Tensor], batch: Batch, setting: Setting) -> Losses:
    counts = element_counts(batch.counts, setting.module.sizes())
    scales = dict(zip(TERMS, term_scales(counts, term_weights(DISTILLATION), 1.0), strict=True))
    loss = sum(
        (scales[name] * term for name, term in terms.items()), start=torch.zeros((), device=setting.device)
    )
    setting.edge.on_reached()
    loss.backward()  # type: ignore[no-untyped-call]
    sums = [terms[name].item() if name in terms else 0.0 for name in TERMS]
    return {name: value for name, value in _means(sums, batch, setting).items() if name in terms}


def _means(sums: list[float], batch: Batch, setting: Setting) -> Losses:
    counts = element_counts(batch.counts, setting.module.sizes())
    return {name: value / max(counts[name], 1) for name, value in zip(TERMS, sums, strict=True)}


def _patches(model: MobileVLM, batch: Batch) -> torch.Tensor:
    tower = model.vision_tower
    with torch.no_grad():
        pixels = batch.pixel_values.to(tower.embeddings.patch_embedding.weight.dtype)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in list(tower.encoder.layers)[:-1]:  # hidden state -2
            hidden = layer(hidden, attention_mask=None)
        patches: torch.Tensor = hidden[:, 1:]
    return patches


def _hidden(model: MobileVLM, batch: Batch, vision_tokens_IVD: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = _run(model, batch, vision_tokens_IVD).last_hidden_state
    return hidden


def _run(model: MobileVLM, batch: Batch, vision_tokens_IVD: torch.Tensor, **more: Any) -> Any:
    embeddings = model.embed(batch, vision_tokens_IVD)
    return model.language_model(inputs_embeds=embeddings, use_cache=False, **more)


@contextmanager
def _eager(model: MobileVLM) -> Iterator[None]:
    config = model.language_model.config
    usual = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def _cut_block(map_BHLL: torch.Tensor, batch: Batch, vision_tokens: int) -> torch.Tensor:
    """[I, H, M, V] out of a whole attention map."""
    rows_IM = batch.text_rows_IM.clamp(min=0)
    columns_IV = batch.image_starts[:, None] + torch.arange(vision_tokens, device=rows_IM.device)
    maps_IHLL = map_BHLL[batch.image_samples]
    block = maps_IHLL.gather(
        2, rows_IM[:, None, :, None].expand(-1, maps_IHLL.shape[1], -1, maps_IHLL.shape[3])
    )
    columns = columns_IV[:, None, None, :].expand(-1, block.shape[1], block.shape[2], -1)
    return block.gather(3, columns).float()


Step = Callable[[Setting, Samples], Losses]


def plain_head(setting: Setting, samples: Samples) -> Losses:
    """``distillation.fused_head: false``."""
    with _replaced(setting.module, "fused_head", False):
        return ours(setting, samples)


def whole_block(setting: Setting, samples: Samples) -> Losses:
    """``distillation.fused_attention: false``."""
    with _replaced(setting.module, "fused_attention", False):
        return ours(setting, samples)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


METHODS: dict[str, Step] = {
    "floor": floor,
    "ours": ours,
    "ours, padded": padded,
    "ours, two towers": two_towers,
    "ours, head not fused": plain_head,
    "ours, attention term not fused": whole_block,
    "stand-in": stand_in,
}
