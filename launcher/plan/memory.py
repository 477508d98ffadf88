"""The memory of one rank, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from alignkd.config import Config
from launcher.plan import activations
from launcher.plan.measurements import measures_gradients
from launcher.plan.sharding import (
    Rendered,
    alive_at_most,
    answer_bytes,
    gathered,
    resident,
    sharded,
    shares_tower,
    student_size,
    teacher_ranks,
    teacher_size,
)
from launcher.plan.sizes import RunSizes
from launcher.plan.trained import LORA, trained_parts
from launcher.plan.workload import Cluster, Workload

Phase = Literal["always", "teacher", "student", "optimizer", "answers"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FP32 = 4


@dataclass(frozen=True)
class Part:
    """``phase`` is when the part exists. Apart from "always", parts of different phases never coexist."""

    name: str
    bytes: int
    phase: Phase = "always"
    in_host_memory: bool = False


@dataclass(frozen=True)
class Memory:
    """``teacher_alive``: bytes of a sharded teacher that a GPU may hold gathered when it is behind the host.
    They are not needed: an allocator that has none left waits for the device instead."""

    parts: tuple[Part, ...]
    teacher_alive: int = 0

    def phase_bytes(self, phase: Phase) -> int:
        return sum(part.bytes for part in self.parts if part.phase == phase and not part.in_host_memory)

    @property
    def peak_phase(self) -> Phase:
        return max(PHASES[1:], key=self.phase_bytes)

    @property
    def peak(self) -> int:
        """Bytes of tensors on a rank's device at the peak of an optimizer step or of the answers after it."""
        return self.phase_bytes("always") + self.phase_bytes(self.peak_phase)

    @property
    def host(self) -> int:
        return sum(part.bytes for part in self.parts if part.in_host_memory)


def run_memory(config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered) -> Memory:
    images = work.accumulation * work.images
    pixels = activations.pixel_bytes(sizes.student.shapes, images, FP32)
    if sizes.teacher is not None and sizes.teacher.shapes.vision_tokens != work.vision_tokens:
        pixels += activations.pixel_bytes(sizes.teacher.shapes, images, FP32)  # it has images of its own
    parts = [Part("images of a step", pixels), *_cached_hidden(config, sizes, work)]
    parts += teacher_weights(config, sizes, cluster, files) + _teacher_work(
        config, sizes, work, cluster, files
    )
    parts += student_states(config, sizes, cluster, files) + _student_work(
        config, sizes, work, cluster, files
    )
    parts += _answering_student(config, sizes)
    return Memory(tuple(part for part in parts if part.bytes), _teacher_alive(config, sizes, cluster, files))


def _answering_student(config: Config, sizes: RunSizes) -> list[Part]:
    """For ``evaluation.task`` each rank copies a sharded student, one gathered tensor after the other, and
    then the layers with LoRA merged into them (``alignkd.evaluate.live_student``). Not counted: the keys and
    values of one batch of questions."""
    if config.evaluation.every is None or config.evaluation.task is None:
        return []
    student, size = sizes.student, student_size(config)
    merged = _merged_bytes(student.tensors, size)
    if config.student.zero_stage < 3:
        return [Part("merged layers, to answer", merged, "answers")]
    beside = max(merged, max(student.tensors.values()) * size)
    return [Part("student's copy, to answer", student.count() * size + beside, "answers")]


def _merged_bytes(tensors: dict[str, int], size: int) -> int:
    """At the peak of ``alignkd.models.lora.merged``: each matrix with adapters is added up in fp32."""
    adapted = {name.partition(LORA)[0] + ".weight" for name in tensors if LORA in name}
    matrices = [tensors[name] for name in adapted]
    # The matrix, its change and their sum or what that is made of; in fp32 only the change is no result.
    beside_result = FP32 if size == FP32 else 3 * FP32 - size
    return sum(matrices) * size + max(matrices, default=0) * beside_result


def _cached_hidden(config: Config, sizes: RunSizes, work: Workload) -> list[Part]:
    """What micro-batches bring from a cache, and the copy that joins those of a forward, which is among the
    targets later."""
    if sizes.teacher is None or config.teacher.placement != "cached":
        return []
    of_batch = work.supervised * answer_bytes(config, sizes.teacher.shapes.hidden_size)
    joined = of_batch * work.window if work.window > 1 else 0
    what = "top-k tokens" if config.teacher.caches_top_k else "hidden states"
    return [
        Part(f"cached {what} of a step", of_batch * work.accumulation),
        Part(f"cached {what}, joined", joined, "teacher"),
    ]


def _teacher_alive(config: Config, sizes: RunSizes, cluster: Cluster, files: Rendered) -> int:
    if sizes.teacher is None or files.teacher is None:
        return 0
    elements = alive_at_most(sizes.teacher, files.teacher, teacher_ranks(config, cluster))
    # The losses gather the head separately.
    return max(elements - sizes.teacher.count("head."), 0) * teacher_size(config)


def teacher_weights(config: Config, sizes: RunSizes, cluster: Cluster, files: Rendered) -> list[Part]:
    """What exists outside the teacher's forward, too."""
    teacher, zero = sizes.teacher, files.teacher
    if teacher is None:
        return []
    size = teacher_size(config)
    if zero is None:
        return [Part("teacher, whole", teacher.count() * size)]
    shard = sharded(teacher.tensors.values(), teacher_ranks(config, cluster)) * size
    return [
        Part("teacher shard", shard, in_host_memory="offload_param" in zero),
        Part("teacher's small tensors", resident(teacher.used, zero) * size),
        *_head(config, teacher.head * size),
    ]


def _head(config: Config, size: int) -> list[Part]:
    """A sharded teacher's head, whole: until the last backward of a step, or for good."""
    if config.teacher.keep_head:
        return [Part("teacher's head", size)]
    return [Part("teacher's head, for a step", size, phase) for phase in ("teacher", "student")]


def _teacher_work(
    config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered
) -> list[Part]:
    teacher, zero = sizes.teacher, files.teacher
    if teacher is None:
        return []
    size = teacher_size(config)
    shares = shares_tower(config, sizes)
    layers = 0 if zero is None else gathered(teacher, zero, teacher_ranks(config, cluster))
    answer = answer_bytes(config, teacher.shapes.hidden_size)
    targets = activations.target_bytes(teacher.shapes, work, size, answer, shares_tower=shares)
    # The targets are on the student's grid of vision tokens, the forward on the teacher's.
    larger = work.with_images_of(max(teacher.shapes.vision_tokens, work.vision_tokens))
    resampled = 0
    if teacher.shapes.vision_tokens != work.vision_tokens:
        resampled = activations.resampled_bytes(teacher.shapes, work)
    forward = activations.teacher_workspace(
        teacher.shapes, larger, size, answer, shares_tower=shares, resampled=resampled
    )
    return [
        Part("teacher's targets", targets, "student"),
        Part("teacher's forward", forward, "teacher"),
        Part("teacher's gathered layers", layers * size, "teacher"),
    ]


def student_states(config: Config, sizes: RunSizes, cluster: Cluster, files: Rendered) -> list[Part]:
    """Weights, gradients, optimizer states and buckets as in DeepSpeed 0.19.8; a test compares them with real
    engines."""
    stage, zero, offload = config.student.zero_stage, files.student, config.student.offload
    size, half = student_size(config), config.training.precision != "fp32"
    trainable, frozen = sizes.trainable(config), sizes.frozen(config)
    whole = sum(trainable.values())
    own = {0: whole, 3: sharded(trainable.values(), cluster.ranks)}.get(stage, -(-whole // cluster.ranks))
    if stage == 3:
        weights = own + sharded(frozen.values(), cluster.ranks)
        small = resident(sizes.student.used | sizes.adapters, zero)
    else:
        weights, small = whole + sum(frozen.values()), 0
    # Stages 0 and 1 keep whole gradients in the model's dtype, 2 and 3 their shard in fp32.
    gradients = whole * size if stage < 2 else own * FP32
    masters = own * FP32 if half or stage > 0 else 0  # ZeRO copies even fp32 weights
    bucket = zero.get("reduce_bucket_size", 0) * size
    return [
        Part("student's weights", weights * size, in_host_memory=offload and stage == 3),
        Part("student's small tensors", small * size),
        Part("gradients", gradients, in_host_memory=offload and stage >= 2),
        Part("fp32 weights", masters, in_host_memory=offload),
        Part("AdamW's two moments", 2 * own * FP32, in_host_memory=offload),
        # The optimizer gets the gradients as one new fp32 tensor.
        Part("fp32 gradients", own * FP32 if masters and not offload else 0, "optimizer"),
        # Stages 1 and 2 have two, in the backward only: one is filled while the other is sent.
        Part("gradient buckets", bucket if stage == 3 else 0),
        Part("gradient buckets", 2 * bucket if stage in (1, 2) else 0, "student"),
    ]


def _student_work(
    config: Config, sizes: RunSizes, work: Workload, cluster: Cluster, files: Rendered
) -> list[Part]:
    student, trained = sizes.student, trained_parts(config)
    again = activations.checkpointed_layers(config.training, student.shapes)
    size = student_size(config)
    kept = activations.kept_bytes(student.shapes, work, size, trained, checkpointed=again)
    if not shares_tower(config, sizes):  # else the patches are among the targets
        kept += activations.patch_bytes(student.shapes, work.images, size)
    of_layer = activations.layer_workspace(student.shapes, work, size, trained, checkpointed=again)
    workspace = max(
        of_layer,
        activations.logits_workspace(student.shapes, work, trained),
        activations.block_workspace(student.shapes, work, size),
    )
    measured = sum(student.trainable(trained).values()) * size if measures_gradients(config) else 0
    layers = gathered(student, files.student, cluster.ranks) * size if config.student.zero_stage == 3 else 0
    return [
        Part("activations for backward", kept, "student"),
        Part("layer or chunk workspace", workspace, "student"),
        Part("a term's gradients, measured", measured, "student"),
        Part("student's gathered layers", layers, "student"),
    ]
