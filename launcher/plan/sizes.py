"""The number of parameters of a model, tensor by tensor, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.config import Config
from alignkd.config.schema import DataSection
from alignkd.errors import CheckpointError
from alignkd.models.agreement import student_folder
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.table import family_of
from launcher.plan.family_sizes import family_sizes
from launcher.plan.shapes import ModelShapes, mobilevlm_shapes
from launcher.plan.tensors import ModelSizes, linear, norm
from launcher.plan.trained import lora_sizes, trained_parts
from launcher.plan.upstream_stages import config_folders


@dataclass(frozen=True)
class RunSizes:
    teacher: ModelSizes | None  # None: no distillation
    student: ModelSizes  # with its LoRA matrices, if any
    adapters: dict[str, int]

    def trainable(self, config: Config) -> dict[str, int]:
        """Tensors that the student's engine trains, including the adapters."""
        return self.student.trainable(trained_parts(config)) | self.adapters

    @property
    def notes(self) -> list[str]:
        """What the plan does not know of the models, and what it assumes, each once."""
        models = [self.student] if self.teacher is None else [self.teacher, self.student]
        return list(dict.fromkeys(note for model in models for note in model.notes))

    def frozen(self, config: Config) -> dict[str, int]:
        trainable = self.trainable(config)
        return {name: size for name, size in self.student.tensors.items() if name not in trainable}


def run_sizes(config: Config, stages: Sequence[Config] = ()) -> RunSizes:
    """``stages`` are those that may have yet to write the models. Raises CheckpointError with every key whose
    folder has no usable ``config.json``."""
    model, problems = config.model, []
    key = "model.student_config" if model.student == "scratch" else "model.student"
    wanted: dict[str, tuple[Path, str | None]] = {key: (student_folder(model), model.vision_tower)}
    if config.distillation.enabled and model.teacher is not None:
        wanted["model.teacher"] = Path(model.teacher), None
    found: dict[str, ModelSizes] = {}
    for name, (folder, tower) in wanted.items():
        try:
            found[name] = _sizes_of(folder, tower, stages, config.data, found.get(key))
        except CheckpointError as error:
            problems.append(f"{name} = {folder}: {error}")
    if problems:
        raise CheckpointError("\n".join(problems))
    student, teacher = found[key], found.get("model.teacher")
    if config.student.lora is not None:
        lora = lora_sizes(student.shapes, config.student.lora.rank)
        student = replace(student, tensors=student.tensors | lora)
    adapters = {} if teacher is None else adapter_sizes(teacher.shapes, student.shapes)
    return RunSizes(teacher, student, adapters)


def held_sizes(config: Config, sizes: RunSizes) -> RunSizes:
    """The same with what a rank holds and runs of the teacher: all, or the parts that a cache does not
    replace."""
    if config.teacher.placement != "cached" or sizes.teacher is None:
        return sizes
    not_held = ("head.",) if config.teacher.caches_top_k else ()
    held = {
        name: size
        for name, size in sizes.teacher.tensors.items()
        if _is_held_beside_a_cache(name) and not name.startswith(not_held)
    }
    shapes = replace(sizes.teacher.shapes, num_hidden_layers=0)
    parts = replace(sizes.teacher, shapes=shapes, tensors=held)
    return replace(sizes, teacher=parts)


def _is_held_beside_a_cache(name: str) -> bool:
    first = "language_model.layers.0."
    in_first = tuple(first + part for part in ("input_layernorm.", "self_attn.q_proj.", "self_attn.k_proj."))
    return name.startswith(in_first) or not name.startswith(
        ("language_model.layers.", "language_model.norm.")
    )


def _sizes_of(
    folder: Path, tower: str | None, stages: Sequence[Config], data: DataSection, student: ModelSizes | None
) -> ModelSizes:
    start, own_tower = config_folders(folder, tower, stages)
    family = None if own_tower is not None else family_of(start)
    if family is not None:
        return family_sizes(start, family.model_type, data, student)
    return model_sizes(read_model_config(start, own_tower))


def model_sizes(config: MobileVLMConfig) -> ModelSizes:
    D, F, W = config.hidden_size, config.intermediate_size, config.vocab_size
    keys = D // config.num_attention_heads * config.num_key_value_heads
    tensors = _tower_sizes(config.tower_config) | {
        **linear("projector.mlp.mlp.0", config.mm_hidden_size, D),
        **linear("projector.mlp.mlp.2", D, D),
        "projector.peg.peg.0.weight": D * 3 * 3,  # depthwise
        "projector.peg.peg.0.bias": D,
        "language_model.embed_tokens.weight": W * D,
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"language_model.layers.{layer}."
        tensors |= {
            f"{prefix}self_attn.q_proj.weight": D * D,
            f"{prefix}self_attn.k_proj.weight": D * keys,
            f"{prefix}self_attn.v_proj.weight": D * keys,
            f"{prefix}self_attn.o_proj.weight": D * D,
            f"{prefix}mlp.gate_proj.weight": D * F,
            f"{prefix}mlp.up_proj.weight": D * F,
            f"{prefix}mlp.down_proj.weight": D * F,
            f"{prefix}input_layernorm.weight": D,
            f"{prefix}post_attention_layernorm.weight": D,
        }
    tensors |= {"language_model.norm.weight": D, "head.weight": W * D}
    shapes, blocks = mobilevlm_shapes(config), "vision_tower.encoder.layers."
    # The last layer that runs outputs the selected hidden state.
    unused = frozenset(
        name
        for name in tensors
        if name.startswith("vision_tower.post_layernorm.")
        or (name.startswith(blocks) and int(name.split(".")[3]) >= shapes.vision.layers)
    )
    tower = {**config.tower_config, "layers that run": shapes.vision.layers}
    return ModelSizes(shapes, tensors, blocks, unused, tower)


def adapter_sizes(teacher: ModelShapes, student: ModelShapes) -> dict[str, int]:
    return linear("adapters.attention", teacher.num_attention_heads, student.num_attention_heads) | linear(
        "adapters.vision", teacher.hidden_size, student.hidden_size
    )


def _tower_sizes(tower: dict[str, Any]) -> dict[str, int]:
    width, mlp = tower["hidden_size"], tower["intermediate_size"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    prefix = "vision_tower."
    sizes = {
        f"{prefix}embeddings.class_embedding": width,
        f"{prefix}embeddings.patch_embedding.weight": width
        * tower["num_channels"]
        * tower["patch_size"] ** 2,
        f"{prefix}embeddings.position_embedding.weight": (patches + 1) * width,
        **norm(f"{prefix}pre_layrnorm", width),
        **norm(f"{prefix}post_layernorm", width),
    }
    for layer in range(tower["num_hidden_layers"]):
        inner = f"{prefix}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes |= linear(f"{inner}self_attn.{name}", width, width)
        sizes |= linear(f"{inner}mlp.fc1", width, mlp) | linear(f"{inner}mlp.fc2", mlp, width)
        sizes |= norm(f"{inner}layer_norm1", width) | norm(f"{inner}layer_norm2", width)
    return sizes
