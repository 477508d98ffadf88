"""Bytes that a forward keeps for backward, and what works for a moment only.

Counted from the operations of transformers' LLaMA (5.23) with SDPA; a test compares them with
``saved_tensors_hooks``. Shapes: T tokens of the micro-batch, D width, F width of the MLP, I images, P
patches, V vision tokens, N supervised positions, W vocabulary. ``size`` is bytes of an element of the model's
dtype.
"""

from __future__ import annotations

from alignkd.models.configuration import MobileVLMConfig
from launcher.plan.workload import Workload

FP32 = 4
POSITIONS_PER_CHUNK = 512  # alignkd.losses.logits, which needs torch
ROWS_PER_CHUNK = 128  # alignkd.models.attention
# [C, W] matrices in fp32 alive at once in a chunk's backward: logits and log-softmax of both models, their
# gradients, the divergence's intermediate results.
CHUNK_MATRICES = 8


def layer_bytes(config: MobileVLMConfig, tokens: int, size: int) -> int:
    """Kept by one decoder layer without gradient checkpointing, its input included."""
    D, F = config.hidden_size, config.intermediate_size
    keys = D // config.num_attention_heads * config.num_key_value_heads
    # RMSNorm works in fp32: its input (a copy of it, unless fp32 already), the scale, what comes before the
    # weight, and the output, which is the input of the next matrices.
    norm = D * FP32 + FP32 + 2 * D * size
    attention = (2 * D + 2 * keys) * size + config.num_attention_heads * FP32  # q, k, v, output, log-sum-exp
    mlp = 4 * F * size
    return tokens * (2 * norm + attention + mlp)


def patches_of(config: MobileVLMConfig) -> int:
    return int((config.tower_config["image_size"] // config.tower_config["patch_size"]) ** 2)


def projector_bytes(config: MobileVLMConfig, images: int, size: int) -> int:
    """Kept by the projector; the tower's output is one of its inputs."""
    patches, D = patches_of(config), config.hidden_size
    per_patch = config.mm_hidden_size + 3 * D  # both matrices' inputs, GELU's input, the pooling's input
    return images * size * (patches * per_patch + config.vision_tokens * D)


def kept_bytes(config: MobileVLMConfig, work: Workload, size: int, *, checkpointing: bool) -> int:
    """What the student's forward of one micro-batch keeps for its backward (frozen vision tower)."""
    D = config.hidden_size
    if checkpointing:
        layers = config.num_hidden_layers * work.tokens * D * size
    else:
        layers = config.num_hidden_layers * layer_bytes(config, work.tokens, size)
    last_norm = work.tokens * (D * FP32 + FP32 + D * size)
    head = work.supervised * D * size
    return layers + last_norm + head + projector_bytes(config, work.images, size)


def layer_workspace(config: MobileVLMConfig, work: Workload, size: int, *, checkpointing: bool) -> int:
    """For a moment in the backward of one layer: what it recomputes, and gradients of its widest tensors."""
    recomputed = layer_bytes(config, work.tokens, size) if checkpointing else 0
    gradients = work.tokens * (3 * config.intermediate_size + 2 * config.hidden_size) * size
    return recomputed + gradients


def logits_workspace(config: MobileVLMConfig, work: Workload) -> int:
    """One chunk of logits, in the backward of the loss."""
    return min(work.supervised, POSITIONS_PER_CHUNK) * config.vocab_size * FP32 * CHUNK_MATRICES


def block_workspace(config: MobileVLMConfig, work: Workload) -> int:
    """One chunk of full attention rows of the first layer: scores, and their mask and gradient."""
    rows = min(work.text_rows, ROWS_PER_CHUNK)
    return 3 * work.images * config.num_attention_heads * rows * work.length * FP32


def forward_workspace(config: MobileVLMConfig, work: Workload, size: int) -> int:
    """For a moment in a forward without gradients: the widest layer of the language model or the tower."""
    text = work.tokens * (4 * config.intermediate_size + 4 * config.hidden_size) * size
    tower = config.tower_config
    widths = 3 * tower["intermediate_size"] + 4 * tower["hidden_size"]
    vision: int = work.images * (patches_of(config) + 1) * widths * size
    return max(text, vision, block_workspace(config, work))


def target_bytes(teacher: MobileVLMConfig, work: Workload, size: int) -> int:
    """What is kept of one teacher forward: hidden states, block and vision tokens of a micro-batch."""
    block = work.images * teacher.num_attention_heads * work.text_rows * work.vision_tokens * FP32
    hidden = work.supervised * teacher.hidden_size * size
    vision = work.images * work.vision_tokens * teacher.hidden_size * size
    return block + hidden + vision
