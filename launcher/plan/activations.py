"""Bytes of the activations that a forward keeps for its backward, and of temporary tensors ("workspace").

Counted from the operations of transformers' LLaMA (5.23) with SDPA and of our losses; a test compares them
with the tensors of real modules. Kept activations agree to a few percent; workspaces are coarse. ``size`` is
the bytes per element of the model's dtype.
"""

from __future__ import annotations

import math

from alignkd.config.schema import TrainingSection
from launcher.plan.shapes import ModelShapes
from launcher.plan.trained import LINEAR_LAYERS, Trained
from launcher.plan.workload import Workload

FP32 = 4
POSITIONS_PER_CHUNK = 512  # as in alignkd.losses.fused_logits, which imports torch; a test compares them
ROWS_PER_CHUNK = 512  # as in alignkd.losses.attention
# fp32 matrices [positions, vocabulary] alive at once in a chunk (js, or a temperature, needs one more).
CHUNK_MATRICES = 3


def layer_bytes(shapes: ModelShapes, tokens: int, size: int, trained: Trained) -> int:
    """Kept by one decoder layer without gradient checkpointing, including its input."""
    D, F = shapes.hidden_size, shapes.intermediate_size
    # RMSNorm computes in fp32. Kept: its input (a copy, unless it is fp32 already), the scale, the product
    # before a trained weight, and the output, if the next matrices, or LoRA's beside them, are trained.
    norm = D * FP32 + FP32 + D * size * (trained.language_model + trained.reads_inputs)
    attention = (
        2 * (shapes.query_width + shapes.key_width) * size + shapes.num_attention_heads * FP32
    )  # q, k, v, output, log-sum-exp
    mlp = (3 + trained.reads_inputs) * F * size
    between = LINEAR_LAYERS * trained.lora_rank * size  # LoRA's two matrices of each
    return tokens * (2 * norm + attention + mlp + between)


def projector_bytes(shapes: ModelShapes, images: int, size: int) -> int:
    """Kept by the projector, without its input."""
    return images * size * shapes.vision.projector_values


def patch_bytes(shapes: ModelShapes, images: int, size: int) -> int:
    """The vision tower's output."""
    return images * shapes.vision.patches * shapes.vision.width * size


def checkpointed_layers(training: TrainingSection, shapes: ModelShapes) -> int:
    """Decoder layers whose forward runs again in the backward."""
    every = training.checkpoint_every_nth_layer
    return -(-shapes.num_hidden_layers // every) if training.gradient_checkpointing else 0


def kept_bytes(shapes: ModelShapes, work: Workload, size: int, trained: Trained, *, checkpointed: int) -> int:
    """What the student's forward over one micro-batch keeps for its backward, with a frozen vision tower and
    without the tower's output. ``checkpointed`` layers keep their input only."""
    D = shapes.hidden_size
    layers = checkpointed * work.tokens * D * size
    layers += (shapes.num_hidden_layers - checkpointed) * layer_bytes(shapes, work.tokens, size, trained)
    if checkpointed:  # the first layer is always one of them
        layers += first_layer_bytes(shapes, work.tokens, size)
    last_norm = work.tokens * (D * FP32 + FP32 + D * size * trained.language_model)
    head = work.supervised * D * FP32
    vision_term = work.images * work.vision_tokens * D * FP32
    projector = projector_bytes(shapes, work.images, size) if trained.projector else 0
    return layers + last_norm + head + vision_term + projector


def first_layer_bytes(shapes: ModelShapes, tokens: int, size: int) -> int:
    """Queries and keys of the first layer, which the attention loss needs after the model's forward."""
    return tokens * (shapes.query_width + shapes.key_width) * size


def layer_workspace(
    shapes: ModelShapes, work: Workload, size: int, trained: Trained, *, checkpointed: int
) -> int:
    """In the backward of one layer: recomputed activations, and the gradients of its widest tensors."""
    recomputed = layer_bytes(shapes, work.tokens, size, trained) if checkpointed else 0
    return recomputed + work.tokens * (shapes.intermediate_size + 2 * shapes.hidden_size) * size


def logits_workspace(shapes: ModelShapes, work: Workload, trained: Trained) -> int:
    """The last chunk of logits, and the gradient of a trained head's weight, which the fused losses compute
    in the forward."""
    chunk = min(work.supervised, POSITIONS_PER_CHUNK) * shapes.vocab_size * FP32 * CHUNK_MATRICES
    return chunk + (head_gradient_bytes(shapes) if trained.language_model else 0)


def head_gradient_bytes(shapes: ModelShapes) -> int:
    return shapes.vocab_size * shapes.hidden_size * FP32


def block_workspace(shapes: ModelShapes, work: Workload, size: int) -> int:
    """One chunk of full attention rows of the first layer: scores as they are computed, and in fp32 those,
    the masked ones and their gradient."""
    rows = min(work.text_rows, ROWS_PER_CHUNK)
    return shapes.num_attention_heads * rows * work.length * (3 * FP32 + (size if size < FP32 else 0))


def pixel_bytes(shapes: ModelShapes, images: int, size: int) -> int:
    """Preprocessed images."""
    return images * shapes.vision.values * size


def block_bytes(shapes: ModelShapes, work: Workload) -> int:
    """The attention blocks of a window in fp32, as they are computed."""
    images = work.window * work.images
    return images * shapes.num_attention_heads * work.text_rows * work.vision_tokens * FP32


def resampled_bytes(teacher: ModelShapes, work: Workload) -> int:
    """The same on the student's grid, beside what only has the columns of that grid."""
    between = math.isqrt(teacher.vision_tokens * work.vision_tokens)
    return block_bytes(teacher, work) + block_bytes(teacher, work.with_images_of(between))


def teacher_workspace(
    shapes: ModelShapes, work: Workload, size: int, answer: int, *, shares_tower: bool, resampled: int = 0
) -> int:
    """The peak of a forward without gradients over a whole window, including the targets. ``answer``: bytes
    of what the logit term compares with, for each position. ``resampled``: see ``resampled_bytes``, if the
    student's grid is another."""
    D, F, tower = shapes.hidden_size, shapes.intermediate_size, shapes.vision
    half, tokens, images = size < FP32, work.window * work.tokens, work.window * work.images
    widths = 3 * tower.mlp + 4 * tower.width
    in_tower = images * (tower.patches + 1) * widths * size
    in_tower += pixel_bytes(shapes, images, size) if half else 0  # a copy in the model's dtype
    vision = images * work.vision_tokens * D * size + patch_bytes(shapes, images, size)
    first_layer = first_layer_bytes(shapes, tokens, size)
    in_a_layer = vision + first_layer + tokens * ((3 * F + 4 * D) * size + (D * FP32 if half else 0))
    block = block_bytes(shapes, work)
    in_the_block = vision + first_layer + tokens * D * size + block
    in_the_block += max(block_workspace(shapes, work, size), resampled)  # one after the other
    at_the_end = (block if half else 0) + target_bytes(shapes, work, size, answer, shares_tower=shares_tower)
    side_by_side = pixel_bytes(shapes, images, FP32) if work.window > 1 else 0
    return side_by_side + int(max(in_tower, in_a_layer, in_the_block, at_the_end))


def target_bytes(teacher: ModelShapes, work: Workload, size: int, answer: int, *, shares_tower: bool) -> int:
    """What is kept of one teacher forward over a window: hidden states, or top-k tokens, of ``answer`` bytes
    for each position, attention block, vision tokens and, for a student that shares the tower, patches."""
    block = work.images * teacher.num_attention_heads * work.text_rows * work.vision_tokens
    vision = work.images * work.vision_tokens * teacher.hidden_size
    patches = patch_bytes(teacher, work.images, size) if shares_tower else 0
    return work.window * ((block + vision) * size + work.supervised * answer + patches)
