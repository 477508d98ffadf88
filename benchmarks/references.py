"""What ``ours`` is measured against: code of the benchmark, each a function of a window of micro-batches.

``floor``: what no method can do without. The frozen teacher's forward and the student's forward and backward,
both with fused attention, one vision tower, cross-entropy and KL at the supervised positions by the product's
fused losses; none of the alignment terms. For batches that bring the teacher's hidden states along, its
forward is left out: then this is what no step from a cache can do without. ``stand_in``: the usual way, with
attention maps of all layers, fp32 logits at all positions and two towers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from alignkd.data.batch import Batch
from alignkd.engine.optimizer_step import term_weights
from alignkd.losses.attention import attention_loss_sum
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.logits import LogitTargets, divergence_sum
from alignkd.losses.total import TERMS, term_scales
from alignkd.losses.vision import focus_indices, vision_loss_sums
from alignkd.models.families.mobilevlm import MobileVLM
from benchmarks.setting import DISTILLATION, Setting, Sums

Terms = dict[str, torch.Tensor]
Scales = dict[str, float]


def floor(setting: Setting, window: Sequence[Batch]) -> Sums:
    return _step(setting, window, _floor_terms)


def stand_in(setting: Setting, window: Sequence[Batch]) -> Sums:
    return _step(setting, window, _stand_in_terms)


def _step(
    setting: Setting,
    window: Sequence[Batch],
    terms_of: Callable[[Setting, Batch, Scales], tuple[torch.Tensor, Terms, Any]],
) -> Sums:
    """``terms_of`` returns of a micro-batch: the loss, the terms' sums, and whatever stays alive until its
    backward is done."""
    scales = term_scales(setting.elements(window), term_weights(DISTILLATION), 1.0)
    scale_of = dict(zip(TERMS, scales, strict=True))
    sums = torch.zeros(len(TERMS), device=setting.device)
    terms: Terms = {}
    for batch in window:
        loss, terms, results = terms_of(setting, batch, scale_of)
        zero = torch.zeros((), device=setting.device)
        setting.edge.on_reached()
        loss.backward()  # type: ignore[no-untyped-call]
        sums += torch.stack([terms[name].detach() if name in terms else zero for name in TERMS])
        del results
    return {name: value for name, value in zip(TERMS, sums, strict=True) if name in terms}


def _floor_terms(setting: Setting, batch: Batch, scales: Scales) -> tuple[torch.Tensor, Terms, None]:
    teacher, student = setting.teacher, setting.student
    patches_IPC = _patches(student, batch)
    teacher_ND = batch.teacher_hidden_ND
    if teacher_ND is None:
        with torch.no_grad():
            teacher_hidden = _hidden(teacher, batch, teacher.projector(patches_IPC))
            teacher_ND = teacher_hidden.flatten(0, 1)[batch.logit_positions_N]
            del teacher_hidden
    hidden_BLD = _hidden(student, batch, student.projector(patches_IPC))
    targets = LogitTargets(
        batch.logit_labels_N, teacher_hidden_ND=teacher_ND, teacher_weight_WD=teacher.head.weight.detach()
    )
    hidden_ND = hidden_BLD.flatten(0, 1)[batch.logit_positions_N]
    of_both = (scales["ce"], scales["divergence"])
    loss, sums = student.head(hidden_ND, partial(fused_logit_losses, targets=targets, scales=of_both))
    return loss, {"ce": sums[0], "divergence": sums[1]}, None


def _stand_in_terms(setting: Setting, batch: Batch, scales: Scales) -> tuple[torch.Tensor, Terms, Any]:
    teacher, student = setting.teacher, setting.student
    adapters = setting.module.adapters
    assert adapters is not None
    with _eager(teacher), _eager(student):
        with torch.no_grad():
            teacher_tokens = teacher.projector(_patches(teacher, batch))
            teacher_output = _run(teacher, batch, teacher_tokens, output_attentions=True)
            teacher_logits = teacher.logits(teacher_output.last_hidden_state).float()
        tokens = student.projector(_patches(student, batch))
        output = _run(student, batch, tokens, output_attentions=True)
    assert len(output.attentions) == len(student.language_model.layers)
    logits_BLW = student.logits(output.last_hidden_state).float()
    log_student = logits_BLW.log_softmax(dim=-1).flatten(0, 1)[batch.logit_positions_N]
    log_teacher = teacher_logits.log_softmax(dim=-1).flatten(0, 1)[batch.logit_positions_N]
    teacher_block = _cut_block(teacher_output.attentions[0], batch, teacher.config.vision_tokens)
    block = _cut_block(output.attentions[0], batch, student.config.vision_tokens)
    rows_IM = batch.text_rows_IM
    focus = focus_indices(teacher_block, DISTILLATION.top_k)
    adapted_tokens = adapters.vision(teacher_tokens)
    vision_all, vision_focus = vision_loss_sums(adapted_tokens, tokens, focus, rows_IM)
    p_attn = adapters.attention.weight, adapters.attention.bias
    terms = {
        "ce": F.nll_loss(log_student, batch.logit_labels_N, reduction="sum"),
        "divergence": divergence_sum(log_student, log_teacher, "reverse_kl"),
        "attention": attention_loss_sum(teacher_block, block, *p_attn, rows_IM),
        "vision_all": vision_all,
        "vision_focus": vision_focus,
    }
    # Both forward passes return the maps of all layers.
    loss = torch.stack([scales[name] * term for name, term in terms.items()]).sum()
    return loss, terms, (teacher_output, output, teacher_logits, logits_BLW)


def _patches(model: MobileVLM, batch: Batch) -> torch.Tensor:
    tower = model.vision_tower
    with torch.no_grad():
        pixels = batch.pixel_values.to(tower.dtype)
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
    """Attention that returns its map, in layer 0, too, which has a configuration of its own."""
    layers = model.language_model.layers
    configs = (model.language_model.config, layers[0].self_attn.config)
    usual = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, usual, strict=True):
            config._attn_implementation = implementation


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
