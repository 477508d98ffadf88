"""The tensors of a model, by name, and what a plan asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.plan.shapes import ImageTokens, ModelShapes
from launcher.plan.trained import LORA, Trained


@dataclass(frozen=True)
class ModelSizes:
    """Elements of every tensor, by its name in ``alignkd.models.families.mobilevlm.MobileVLM``; those of
    other families begin alike, and those of LoRA's matrices are peft's. ``notes``: what the plan does not
    know of the model, and what it assumes."""

    shapes: ModelShapes
    tensors: dict[str, int]
    tower_blocks: str  # how the names of the tower's layers begin
    unused: frozenset[str] = frozenset()  # tensors that are only in the files
    tower: dict[str, Any] | None = None  # what must be equal for one tower to serve both models; None: none
    notes: tuple[str, ...] = ()
    images: ImageTokens | None = None  # None: MobileVLM, of whose shapes each image has the vision tokens

    def count(self, prefix: str = "") -> int:
        return sum(size for name, size in self.tensors.items() if name.startswith(prefix))

    @property
    def used(self) -> dict[str, int]:
        """What a forward uses."""
        return {name: size for name, size in self.tensors.items() if name not in self.unused}

    @property
    def head(self) -> int:
        """The head's weight, which may be that of the embeddings."""
        return self.count("head.") or self.count("language_model.embed_tokens.")

    @property
    def projector_matrices(self) -> int:
        return self.count("projector.mlp.") or self.count("projector.")

    @property
    def least_vision_tokens(self) -> int:
        """Of an image."""
        return self.shapes.vision_tokens if self.images is None else self.images.least

    def trainable(self, trained: Trained) -> dict[str, int]:
        return {name: size for name, size in self.used.items() if trained.has(name)}

    @property
    def in_files(self) -> int:
        """Elements in the model's files, which have no LoRA matrices."""
        return sum(size for name, size in self.tensors.items() if LORA not in name)


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> dict[str, int]:
    weight = {f"{name}.weight": inputs * outputs}
    return weight | {f"{name}.bias": outputs} if bias else weight


def norm(name: str, width: int) -> dict[str, int]:
    return {f"{name}.weight": width, f"{name}.bias": width}
