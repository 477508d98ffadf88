"""The typed schema of ``alignkd.yaml``. It defines every key with its unit, default and limits.

Sections are frozen: the configuration of a run does not change once it is resolved.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from alignkd.config.checkpoint_section import CheckpointSection
from alignkd.config.live_sections import LoggingSection, TrackingSection
from alignkd.config.section import NonNegative, PathText, PositiveInt, PositiveRate, Section
from alignkd.config.slurm_section import SlurmSection
from alignkd.config.teacher_section import TeacherSection

Part = Literal["projector", "language_model"]
DEFAULT_MAX_IMAGE_PIXELS = 50_000_000


class RunSection(Section):
    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="name of the run folder: letters, digits and . _ -",
    )
    folder: PathText = Field("runs", description="parent of all run folders")


class ModelSection(Section):
    teacher: PathText | None = Field(
        None, description="folder of the frozen teacher: MobileVLM V2, or a family of docs/models.md"
    )
    student: PathText = Field(
        description="folder to start from: MobileVLM V2, a family of docs/models.md, a plain LLaMA, or "
        "`scratch` for random weights"
    )
    student_config: PathText | None = Field(
        None, description="folder with config.json and tokenizer.model of a `scratch` student"
    )
    vision_tower: PathText | None = Field(
        None,
        description="vision tower of a plain-LLaMA or `scratch` student: a CLIP folder, or a "
        "MobileVLM folder to take it from",
    )
    adapters: PathText | None = Field(
        None,
        description="initial P_attn and P_V: an earlier run's folder, or its adapters.safetensors; "
        "default: random",
    )


class DataSource(Section):
    file: PathText = Field(description="LLaVA-style JSON list or JSON Lines")
    image_folder: PathText | None = Field(
        None, description="image paths are relative to this folder and may not leave it"
    )
    template: Literal["plain", "v1", "chat"] = Field(
        "v1",
        description="`plain` and `v1` are MobileVLM's; `chat` is the chat template of any other folder",
    )
    image_aspect_ratio: Literal["pad", "square"] = Field(
        "pad", description="`pad` pads to a square first (finetuning), `square` crops (pretraining)"
    )
    image_options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the folder's image processor, such as `size`; with the template `chat`",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="repetitions of each sample per epoch; a fraction selects a seeded subset",
    )


class DataSection(Section):
    sources: list[DataSource] = Field(min_length=1)
    max_length: int = Field(
        2048,
        ge=8,
        description="maximum sample length in embedding tokens, images included; longer samples are removed",
    )
    on_bad_sample: Literal["error", "skip"] = "error"
    max_image_pixels: int = Field(
        DEFAULT_MAX_IMAGE_PIXELS, ge=1, description="larger images count as bad samples"
    )
    workers: int = Field(2, ge=0, le=256, description="loader processes per rank")


class TrainingSection(Section):
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    global_batch_size: int = Field(
        128, ge=1, le=2**20, description="samples per optimizer step, over all ranks"
    )
    micro_batch_size: PositiveInt = Field(4, description="samples per rank and forward pass")
    tokens_per_micro_batch: PositiveInt | None = Field(
        None,
        description="token budget per rank and forward pass; splits each global batch instead of "
        "micro_batch_size",
    )
    packing: bool = Field(
        True,
        description="concatenate the samples of a micro-batch into one row; false pads them to the longest",
    )
    learning_rate: PositiveRate = 4e-5
    projector_learning_rate: PositiveRate | None = Field(None, description="default: learning_rate")
    adapter_learning_rate: PositiveRate | None = Field(
        None, description="learning rate of P_attn and P_V; default: that of the projector"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: NonNegative = 0.0
    max_gradient_norm: NonNegative = Field(1.0, description="0 disables clipping")
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    checkpoint_every_nth_layer: PositiveInt = Field(
        1,
        description="with gradient_checkpointing, recompute the first of every so many decoder layers; the "
        "others keep their activations",
    )
    compile_layers: bool = Field(
        False,
        description="compile the decoder layers of every model that ZeRO-3 does not shard, on a GPU; the "
        "first step takes longer, and the nodes need a C compiler",
    )
    deterministic: bool = Field(
        False,
        description="use only kernels that give the same bits each time; on GPUs, where others are faster "
        "(docs/performance.md)",
    )
    max_skipped_steps: PositiveInt = Field(20, description="consecutive overflowing steps that stop the run")
    hang_seconds: int = Field(
        600,
        ge=0,
        description="an attempt without a step for so long (or for 10 steps, if that is longer) is ended; "
        "0: never",
    )
    rendezvous_seconds: PositiveInt = Field(
        300, description="for which ranks wait for each other at the start"
    )
    train_vision_tower: bool = Field(False, description="false freezes it, as in the paper")
    seed: int = Field(0, ge=0, lt=2**31)


class LoraSection(Section):
    rank: PositiveInt = Field(16, description="width of the adapters")
    alpha: float = Field(32.0, gt=0, le=4096, description="adapters are multiplied by alpha / rank")


class StudentSection(Section):
    zero_stage: int = Field(
        2, ge=0, le=3, description="0 shards nothing, 1 optimizer states, 2 also gradients, 3 also weights"
    )
    offload: bool = Field(False, description="optimizer states (and stage-3 parameters) in host memory")
    train: list[Part] | None = Field(
        None,
        description="parts that are trained, the others are frozen; null trains both. The vision tower has "
        "training.train_vision_tower",
    )
    lora: LoraSection | None = Field(
        None,
        description="train low-rank adapters in place of the language model; `{}` takes the defaults",
    )


class DistillationWeights(Section):
    attention: NonNegative = 1.0
    vision: NonNegative = 1.0
    logits: NonNegative = 1.0


class DistillationSection(Section):
    enabled: bool = Field(True, description="false trains the student on the labels only")
    weights: DistillationWeights = Field(default_factory=DistillationWeights)
    vision_focus_weight: NonNegative = Field(0.1, description="lambda of equation 5")
    balance: Literal["fixed", "gradient", "learned"] = Field(
        "fixed",
        description="whether the weights stay as they are, follow the terms' gradient norms, or are learned "
        "(docs/using.md)",
    )
    balance_every: PositiveInt = Field(
        100,
        description="steps between measurements of `gradient`, each of which takes a teacher forward and a "
        "forward and backward per term, of one micro-batch",
    )
    top_k: PositiveInt = Field(16, description="K of equation 3, per image")
    temperature: float = Field(1.0, gt=0, le=100)
    divergence: Literal["reverse_kl", "forward_kl", "js"] = "reverse_kl"
    attention_rows: Literal["all_text", "prompt_only"] = Field(
        "all_text", description="text rows that the attention term compares"
    )
    logit_positions: Literal["supervised", "all_text"] = Field(
        "supervised", description="positions that the logit term compares"
    )
    share_vision_tower: bool = Field(
        True, description="run one frozen vision tower for both models when their weights are equal"
    )


class EvaluationSection(Section):
    every: PositiveInt | None = Field(
        None, description="optimizer steps between evaluations (docs/tracking.md); null: no evaluation"
    )
    sources: list[DataSource] = Field(
        default_factory=list,
        description="held-out data for the loss terms; none of it may be in data.sources",
    )
    samples: PositiveInt = Field(512, description="at most so many of its samples, the same each time")
    task: str | None = Field(
        None, description="a task of `alignkd eval`: the student answers its questions, for the accuracy"
    )
    task_data: PathText | None = Field(
        None, description="folder with the files of the task, as `alignkd eval --data`"
    )
    questions: PositiveInt = Field(256, description="at most so many of the task's, the first ones")
    best: Literal["loss", "ce", "accuracy"] = Field(
        "loss", description="the checkpoint with the lowest value of it, or the highest accuracy, is kept"
    )


class Config(Section):
    """One run. ``stages`` is empty once a stage has been chosen (see ``loading``)."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    data: DataSection
    training: TrainingSection = Field(default_factory=TrainingSection)
    student: StudentSection = Field(default_factory=StudentSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    distillation: DistillationSection = Field(default_factory=DistillationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def named_sources(self) -> dict[str, DataSource]:
        """All sources by their keys: those to train on, then those that are held out."""
        sections = {"data": self.data.sources, "evaluation": self.evaluation.sources}
        return {
            f"{section}.sources[{number}]": source
            for section, sources in sections.items()
            for number, source in enumerate(sources)
        }
