"""The typed schema of ``alignkd.yaml``. Every key has its unit, its default and its limits here.

The sections are frozen: a run's configuration does not change once it is resolved.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from alignkd.config.section import NonNegative, PathText, PositiveInt, PositiveRate, Section
from alignkd.config.slurm_section import SlurmSection

DEFAULT_MAX_IMAGE_PIXELS = 50_000_000


class RunSection(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="name of the run folder: letters, digits and . _ -",
    )
    folder: PathText = Field("runs", description="parent of all run folders")


class ModelSection(Section):
    teacher: PathText | None = Field(None, description="folder of the frozen teacher (MobileVLM V2 format)")
    student: PathText = Field(
        description="folder to start from: MobileVLM V2, a plain LLaMA, or `scratch` for random weights"
    )
    student_config: PathText | None = Field(
        None, description="folder with config.json and tokenizer.model of a `scratch` student"
    )
    vision_tower: PathText | None = Field(
        None,
        description="where the tower of a plain-LLaMA or `scratch` student comes from: a CLIP folder, or a "
        "MobileVLM folder whose tower is taken",
    )
    adapters: PathText | None = Field(
        None,
        description="P_attn and P_V to start from: an earlier run's folder, or its adapters.safetensors; "
        "default: random",
    )


class DataSource(Section):
    file: PathText = Field(description="LLaVA-style JSON list")
    image_folder: PathText | None = Field(
        None, description="image paths are relative to it and may not leave it"
    )
    template: Literal["plain", "v1"] = "v1"
    image_aspect_ratio: Literal["pad", "square"] = Field(
        "pad", description="`pad` pads to a square first (finetuning), `square` crops (pretraining)"
    )
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often a sample comes per epoch; a fraction draws a seeded part"
    )


class DataSection(Section):
    sources: list[DataSource] = Field(min_length=1)
    max_length: int = Field(
        2048, ge=8, description="longest sample in embedding tokens, image included; longer ones are removed"
    )
    on_bad_sample: Literal["error", "skip"] = "error"
    max_image_pixels: int = Field(DEFAULT_MAX_IMAGE_PIXELS, ge=1, description="larger images are refused")
    workers: int = Field(2, ge=0, le=256, description="loader processes per rank")


class TrainingSection(Section):
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps")
    global_batch_size: int = Field(
        128, ge=1, le=2**20, description="samples per optimizer step, over all ranks"
    )
    micro_batch_size: PositiveInt = Field(4, description="samples per rank and forward pass")
    tokens_per_micro_batch: PositiveInt | None = Field(
        None,
        description="most tokens per rank and forward pass; decides the split of the global batch instead of "
        "micro_batch_size, step by step",
    )
    packing: bool = Field(
        True, description="a micro-batch is one row of all its samples; false pads each to the longest"
    )
    learning_rate: PositiveRate = 4e-5
    projector_learning_rate: PositiveRate | None = Field(None, description="default: learning_rate")
    adapter_learning_rate: PositiveRate | None = Field(
        None, description="of P_attn and P_V; default: the projector's"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: NonNegative = 0.0
    max_gradient_norm: NonNegative = Field(1.0, description="0 turns clipping off")
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    compile_layers: bool = Field(
        False,
        description="compile the decoder layers of every model that ZeRO-3 does not shard, on a GPU; the "
        "first step takes longer, and the nodes need a C compiler",
    )
    max_skipped_steps: PositiveInt = Field(20, description="overflowing steps in a row that stop the run")
    train_vision_tower: bool = Field(False, description="false keeps it frozen, as in the paper")
    seed: int = Field(0, ge=0, lt=2**31)


class StudentSection(Section):
    zero_stage: int = Field(
        2, ge=0, le=3, description="0 shards nothing, 3 optimizer states, gradients and weights"
    )
    offload: bool = Field(False, description="optimizer states (and stage-3 parameters) in host memory")


class TeacherSection(Section):
    placement: Literal["zero3", "zero3_node", "zero3_offload", "replicated"] = Field(
        "zero3",
        description="where its weights lie: sharded over all ranks, over the ranks of a node (gathers stay "
        "inside), over all ranks in host memory, or whole on every rank",
    )
    lookahead: PositiveInt | None = Field(
        None, description="micro-batches that one teacher forward serves; default: all of an optimizer step"
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(None, description="default: training.precision")


class DistillationWeights(Section):
    attention: NonNegative = 1.0
    vision: NonNegative = 1.0
    logits: NonNegative = 1.0


class DistillationSection(Section):
    enabled: bool = Field(True, description="false trains the student alone, on the labels")
    weights: DistillationWeights = Field(default_factory=DistillationWeights)
    vision_focus_weight: NonNegative = Field(0.1, description="lambda of equation 5")
    top_k: PositiveInt = Field(16, description="K of equation 3, per image")
    temperature: float = Field(1.0, gt=0, le=100)
    divergence: Literal["reverse_kl", "forward_kl", "js"] = "reverse_kl"
    attention_rows: Literal["all_text", "prompt_only"] = Field(
        "all_text", description="text rows of the attention term"
    )
    logit_positions: Literal["supervised", "all_text"] = Field(
        "supervised", description="positions of the logit term"
    )
    fused_head: bool = Field(
        True,
        description="cross-entropy and logit term take the logits in chunks of positions; false makes and "
        "keeps those of all positions at once",
    )
    fused_attention: bool = Field(
        True,
        description="the attention term without the student's block; false leaves it to autograd, which "
        "keeps whole rows of attention for backward",
    )
    share_vision_tower: bool = Field(
        True, description="the teacher's frozen tower runs for both where the student's is the same"
    )


class CheckpointSection(Section):
    every: PositiveInt = Field(500, description="optimizer steps between two checkpoints")
    keep_last: PositiveInt | None = Field(3, description="checkpoints to keep; null keeps all")
    keep_every: PositiveInt | None = Field(None, description="also keep the multiples of so many steps")
    max_failures: PositiveInt = Field(3, description="failed saves in a row that stop the run")
    asynchronous: bool = Field(
        True,
        description="train on while files are written from a copy in host memory, as large as the rank's "
        "files; without room for it, or with false, training waits",
    )


class Config(Section):
    """One run. ``stages`` is gone once a stage has been chosen (see ``loading``)."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    data: DataSection
    training: TrainingSection = Field(default_factory=TrainingSection)
    student: StudentSection = Field(default_factory=StudentSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)
