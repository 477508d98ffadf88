"""What the engine, the teacher and the losses know of a model, whatever its family.

Shapes: B rows, L columns, D width, I images (see ``data/batch.py``), P patches and C width of the vision
tower, V vision tokens of the image that has most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from alignkd.config.schema import Part
from alignkd.data.batch import Batch
from alignkd.models.attention import FirstLayerAttention

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a language model, and what its first softmax layer can see."""

    num_attention_heads: int
    hidden_size: int
    vision_tokens: int | None  # of every image; None: the batch says how many each has
    window: int | None = None  # keys that a text row sees in the first layer, itself included; None: all
    softcap: float | None = None  # of the logits x: softcap * tanh(x / softcap); None: x


class ModelOutputs(NamedTuple):
    """A tuple, because ZeRO-3's hooks find tensors in tuples, lists and dicts only."""

    hidden_BLD: torch.Tensor  # after the final norm, before the head
    vision_tokens_IVD: torch.Tensor  # in text-embedding space; MobileVLM's include dummy images
    patches_IPC: torch.Tensor | None  # of the tower, if another model may use them; dummy images included
    first_layer: FirstLayerAttention


class LanguageModelHead(nn.Module):
    """The output projection. Its forward lends the weight to a function, because ZeRO-3 gathers the weights
    of a module for the time of its forward only: logits and fused losses alike are computed in there."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.used: int | None = None  # rows that belong to tokens, if the vocabulary is padded

    def forward(
        self,
        hidden: torch.Tensor,
        function: Callable[[torch.Tensor, torch.Tensor], T] = F.linear,  # type: ignore[assignment]
    ) -> T:
        """``function(hidden [..., D], weight [vocab, D])``; by default the logits."""
        return function(hidden, self.cut(self.weight))

    def cut(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of ``weight`` that belong to tokens."""
        return weight if self.used is None else weight[: self.used]


class VisionLanguageModel(nn.Module, ABC):
    """Vision tower -> projector -> language model -> head."""

    head: LanguageModelHead
    train_vision_tower: bool

    @property
    @abstractmethod
    def facts(self) -> ModelFacts: ...

    @abstractmethod
    def forward(self, batch: Batch, patches_IPC: torch.Tensor | None = None) -> ModelOutputs:
        """Run all of the model but the head.

        The same modules run in the same order whatever the batch holds: a rank that skipped one would
        deadlock the other ranks in their collectives. ``patches_IPC``: what an identical tower computed from
        the batch's pixels; this model's own tower does not run then.
        """

    @abstractmethod
    def unfreeze_vision_tower(self) -> None:
        """Train the parts of the tower that are used. It is frozen at first."""

    @abstractmethod
    def enable_gradient_checkpointing(self, every: int = 1) -> None:
        """Recompute the first of every ``every`` decoder layers in backward, and all of a trained tower."""

    @abstractmethod
    def public_name(self, name: str) -> str:
        """The name of a parameter in a model folder."""

    @abstractmethod
    def is_projector(self, name: str) -> bool:
        """Whether a parameter belongs to the projector, which may have a learning rate of its own."""

    @abstractmethod
    def is_vision_tower(self, name: str) -> bool:
        """Whether a parameter lies in the vision tower; a projector may lie in there, too."""

    def part_of(self, name: str) -> Part | None:
        """The part that a parameter belongs to; None is the vision tower, or a module that is never trained.
        The head belongs to the language model."""
        if self.is_projector(name):
            return "projector"
        return None if self.is_vision_tower(name) else "language_model"

    def freeze_all_but(self, parts: Sequence[Part]) -> None:
        """Freeze the projector and the language model, unless ``parts`` name them. Everything else stays as
        it is."""
        for name, parameter in self.named_parameters():
            part = self.part_of(name)
            if part is not None and part not in parts:
                parameter.requires_grad_(False)

    @abstractmethod
    def restore_buffers(self, device: torch.device | str) -> None:
        """Give the buffers their values in their own dtypes. ``zero.Init`` and DeepSpeed's engines cast the
        rotary frequencies to the model's half precision, after which positions drift silently: call this
        after each."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., vocab]."""
        logits: torch.Tensor = self.head(hidden, F.linear)
        softcap = self.facts.softcap
        return logits if softcap is None else (logits / softcap).tanh() * softcap


def keep_activations_between(layers: Iterable[nn.Module], every: int) -> None:
    """Of decoder layers that are all checkpointed, leave the first of every ``every``."""
    for number, layer in enumerate(layers):
        if number % every:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
