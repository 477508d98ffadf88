"""Align-KD's loss terms, usable without the rest of alignkd: they need torch only.

Every term is a sum over its elements; divide it once, by the number of its elements in the whole optimizer
step, over all ranks. ``examples/plain_loop.py`` is a training loop around them. The names below are the
public interface; the rest of the package may change.
"""

from alignkd.losses.attention import (
    BlockLayout,
    attention_loss_sum,
    fused_attention_loss,
    text_vision_block,
)
from alignkd.losses.fused_logits import fused_logit_losses
from alignkd.losses.grids import resample_attention, resample_tokens
from alignkd.losses.logits import IGNORE_INDEX, LogitLosses, LogitTargets, plain_logit_losses
from alignkd.losses.top_tokens import TopTokens, top_tokens
from alignkd.losses.vision import focus_indices, vision_loss_sums

__all__ = [
    "IGNORE_INDEX",
    "BlockLayout",
    "LogitLosses",
    "LogitTargets",
    "TopTokens",
    "attention_loss_sum",
    "focus_indices",
    "fused_attention_loss",
    "fused_logit_losses",
    "plain_logit_losses",
    "resample_attention",
    "resample_tokens",
    "text_vision_block",
    "top_tokens",
    "vision_loss_sums",
]
