"""Floating-point operations of an optimizer step.

A multiplication and an addition are two operations. Counted are the matrix products of the language models,
of their heads at supervised positions, of the towers and of the projectors; causal attention counts half.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.plan.activations import checkpointed_layers
from launcher.plan.sharding import shares_tower
from launcher.plan.sizes import RunSizes
from launcher.plan.tensors import ModelSizes
from launcher.plan.trained import Trained, trained_parts
from launcher.plan.workload import Cluster, Workload

LAYERS = "language_model.layers."


@dataclass(frozen=True)
class Compute:
    teacher_flops: float  # per rank and optimizer step
    student_flops: float
    tokens: float  # per rank and optimizer step, including image tokens
    micro_batches: float  # of the planned size, per rank and optimizer step

    @property
    def flops(self) -> float:
        return self.teacher_flops + self.student_flops


def run_compute(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster) -> Compute:
    student, training = sizes.student, config.training
    trained = trained_parts(config)
    # Gradient checkpointing runs its layers once more.
    forwards = 1 + checkpointed_layers(training, student.shapes) / student.shapes.num_hidden_layers
    tower = 4 if training.gradient_checkpointing else 3
    shared = shares_tower(config, sizes)
    own = (
        forwards * layer_flops(student, work)
        + layer_backward_flops(student, work, trained)
        + head_passes(trained) * head_flops(student, work)
        + projector_passes(trained) * projector_flops(student, work)
        + tower_flops(student, work) * (tower if training.train_vision_tower else 0 if shared else 1)
    )
    teacher = 0.0
    if sizes.teacher is not None:
        model = sizes.teacher
        theirs = work.with_images_of(model.shapes.vision_tokens)
        teacher = layer_flops(model, theirs) + projector_flops(model, theirs) + tower_flops(model, theirs)
        teacher += 0.0 if config.teacher.caches_top_k else head_flops(model, theirs)
    # From a rank's share of the global batch, since micro-batches of a token budget need not be full.
    times = training.global_batch_size / (cluster.ranks * work.samples)
    return Compute(teacher * times, own * times, work.tokens * times, times)


def layer_flops(model: ModelSizes, work: Workload) -> float:
    """One forward of all decoder layers over a micro-batch."""
    return 2.0 * work.tokens * model.count(LAYERS) + attention_flops(model, work)


def layer_backward_flops(model: ModelSizes, work: Workload, trained: Trained) -> float:
    """The gradients of all activations cost a forward, those of trained matrices as much as these do."""
    weights = sum(size for name, size in model.trainable(trained).items() if name.startswith(LAYERS))
    return 2.0 * work.tokens * (model.count(LAYERS) + weights) + 2 * attention_flops(model, work)


def attention_flops(model: ModelSizes, work: Workload) -> float:
    shapes = model.shapes
    return 2.0 * work.tokens * shapes.num_hidden_layers * work.length * shapes.query_width


def head_passes(trained: Trained) -> int:
    """Forward, gradient of the hidden states and, if it is trained, of the weight; in units of a forward."""
    return 3 if trained.language_model else 2


def projector_passes(trained: Trained) -> int:
    """The same. Only a trained tower needs the gradient of a frozen projector's inputs."""
    return 3 if trained.projector else 2 if trained.vision_tower else 1


def head_flops(model: ModelSizes, work: Workload) -> float:
    return 2.0 * work.supervised * model.head


def projector_flops(model: ModelSizes, work: Workload) -> float:
    return 2.0 * work.images * model.shapes.vision.projected * model.projector_matrices


def tower_flops(model: ModelSizes, work: Workload) -> float:
    tower = model.shapes.vision
    used = sum(size for name, size in model.used.items() if name.startswith(model.tower_blocks))
    attention = 2 * tower.layers * tower.seen * tower.width
    return float(2 * work.images * (tower.patches + 1) * (used + attention))
