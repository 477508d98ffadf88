"""Which tensors of a student are trained, as ``alignkd.engine.build.choose_trained_parts`` decides it."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.plan.shapes import ModelShapes

LORA = ".lora_"  # in the names of peft's matrices
LINEAR_LAYERS = 7  # of a decoder layer, each with a pair of LoRA matrices


@dataclass(frozen=True)
class Trained:
    """``language_model``: its own weights, head included. LoRA trains matrices beside them instead."""

    language_model: bool = True
    projector: bool = True
    vision_tower: bool = False
    lora_rank: int = 0  # 0: no LoRA

    def has(self, name: str) -> bool:
        """Whether a tensor is trained, by its name in ``ModelSizes``."""
        if LORA in name:
            return True
        if name.startswith("vision_tower."):
            return self.vision_tower
        return self.projector if name.startswith("projector.") else self.language_model

    def is_in_backward(self, name: str) -> bool:
        """Whether gradients pass through a tensor's module. They always pass through the decoder layers."""
        if name.startswith("projector."):
            return self.projector or self.vision_tower
        is_first = name.startswith(("vision_tower.", "language_model.embed_tokens."))
        return self.has(name) if is_first else True

    @property
    def reads_inputs(self) -> bool:
        """Whether the backward needs the inputs of the decoder's linear layers."""
        return self.language_model or self.lora_rank > 0


def trained_parts(config: Config) -> Trained:
    student = config.student
    named = ("projector", "language_model") if student.train is None else student.train
    return Trained(
        language_model="language_model" in named and student.lora is None,
        projector="projector" in named,
        vision_tower=config.training.train_vision_tower,
        lora_rank=0 if student.lora is None else student.lora.rank,
    )


def lora_sizes(shapes: ModelShapes, rank: int) -> dict[str, int]:
    """peft's matrices beside every linear layer of the language model but its head."""
    D, F, Q, K = shapes.hidden_size, shapes.intermediate_size, shapes.query_width, shapes.key_width
    widths = {
        "self_attn.q_proj": (D, Q),
        "self_attn.k_proj": (D, K),
        "self_attn.v_proj": (D, K),
        "self_attn.o_proj": (Q, D),
        "mlp.gate_proj": (D, F),
        "mlp.up_proj": (D, F),
        "mlp.down_proj": (F, D),
    }
    sizes = {}
    for layer in range(shapes.num_hidden_layers):
        for name, (inputs, outputs) in widths.items():
            prefix = f"language_model.layers.{layer}.{name}{LORA}"
            sizes[f"{prefix}A.default.weight"] = rank * inputs
            sizes[f"{prefix}B.default.weight"] = rank * outputs
    return sizes
