"""MobileVLM V2 on transformers' LLaMA and CLIP classes: vision tower -> projector -> language model -> head.

Everything that a loss can need leaves :meth:`MobileVLM.forward` as :class:`ModelOutputs`; the model knows of
no loss. Shapes: B rows, L columns, D width, I images (see ``data/batch.py``), P patches and C width of the
vision tower, V vision tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from alignkd.data.batch import Batch
from alignkd.models.attention import (
    ATTENTION_NAME,
    FirstLayerAttention,
    FirstLayerCapture,
    capture_first_layer,
    packing_of,
)
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.projector import LDPv2Projector

T = TypeVar("T")


class ModelOutputs(NamedTuple):
    """``patches_IPC`` and ``vision_tokens_IVD``: of the tower and the projector, dummy images included.

    A tuple, because ZeRO-3's hooks find tensors in tuples, lists and dicts only.
    """

    hidden_BLD: torch.Tensor  # after the final norm, before the head
    vision_tokens_IVD: torch.Tensor
    patches_IPC: torch.Tensor
    first_layer: FirstLayerAttention


class LanguageModelHead(nn.Module):
    """The output projection. Its forward lends the weight to a function, because ZeRO-3 gathers the weights
    of a module for the time of its forward only: logits and fused losses alike are computed in there."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, hidden: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], T]) -> T:
        """``function(hidden [..., D], weight [vocab, D])``."""
        return function(hidden, self.weight)


class MobileVLM(nn.Module):
    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(
            CLIPVisionConfig(**config.tower_config, attn_implementation="sdpa")
        )
        self.projector = new_projector(config)
        self.language_model = LlamaModel(llama_config(config))
        capture_first_layer(self.language_model)
        self.head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.train_vision_tower = False
        self.freeze_vision_tower()

    def freeze_vision_tower(self) -> None:
        self.vision_tower.requires_grad_(False)
        self.train_vision_tower = False

    def unfreeze_vision_tower(self) -> None:
        """Train the tower's used layers (the ones after the selected hidden state never get a gradient)."""
        self.train_vision_tower = True
        for module in self.used_tower_modules():
            module.requires_grad_(True)

    def enable_gradient_checkpointing(self) -> None:
        # Non-reentrant: queries and keys leave layer 0 by a side channel, and need their gradients. Random
        # states are kept for dropout only: each layer would copy the device's to the host, and wait for it.
        towers_dropout = float(self.config.tower_config["attention_dropout"])
        modules: list[tuple[Any, bool]] = [(self.language_model, False)]
        if self.train_vision_tower:
            modules.append((self.vision_tower, towers_dropout > 0))
        for module, draws in modules:
            # Renamed between transformers 5.17 and 5.23.
            enable = getattr(module, "activation_checkpointing_enable", None)
            (enable or module.gradient_checkpointing_enable)(
                {"use_reentrant": False, "preserve_rng_state": draws}
            )

    def forward(self, batch: Batch, patches_IPC: torch.Tensor | None = None) -> ModelOutputs:
        """Run all of the model but the head.

        The projector (and the tower) runs whatever the batch holds: a rank that skipped it would deadlock the
        other ranks in their collectives. ``patches_IPC``: what an identical tower computed from the batch's
        pixels; this model's own tower does not run then.
        """
        if patches_IPC is None:
            patches_IPC = self.patches(batch.pixel_values)
        vision_tokens_IVD: torch.Tensor = self.projector(patches_IPC)
        first_layer = FirstLayerCapture()
        # Right padding under causal attention: no mask, since no real token sees a later one.
        embeddings_BLD = self.embed(batch, vision_tokens_IVD)
        output = self.language_model(
            inputs_embeds=embeddings_BLD,
            position_ids=batch.position_ids_BL,
            use_cache=False,
            first_layer=first_layer,
            packing=packing_of(batch, embeddings_BLD, self.head_width),
        )
        return ModelOutputs(output.last_hidden_state, vision_tokens_IVD, patches_IPC, first_layer.take())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., vocab]."""
        logits: torch.Tensor = self.head(hidden, F.linear)
        return logits

    def vision_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [I, 3, S, S] -> vision tokens [I, V, D]."""
        tokens: torch.Tensor = self.projector(self.patches(pixel_values))
        return tokens

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [I, 3, S, S] -> the tower's selected hidden states [I, P, C]."""
        # Not from a layer's `weight`: outside that layer's own forward ZeRO-3 gathers it for the question.
        dtype = next(self.vision_tower.parameters()).dtype
        with torch.set_grad_enabled(self.train_vision_tower and torch.is_grad_enabled()):
            hidden = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixel_values.to(dtype)))
            for layer in self.vision_tower.encoder.layers[: self.used_tower_layers]:
                hidden = layer(hidden, attention_mask=None)
            patches_IPC: torch.Tensor = hidden[:, 1:]  # without the class token
        return patches_IPC

    def embed(self, batch: Batch, vision_tokens_IVD: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, L, D]: those of the tokens, with the vision tokens put into their places."""
        embeddings: torch.Tensor = self.language_model.embed_tokens(batch.input_ids_BL.clamp(min=0))
        real = vision_tokens_IVD[: batch.image_count]
        offsets = torch.arange(self.config.vision_tokens, device=embeddings.device)
        columns_IV = batch.image_starts[:, None] + offsets
        rows_IV = batch.image_samples[:, None].expand_as(columns_IV)
        embeddings = embeddings.index_put((rows_IV, columns_IV), real.to(embeddings.dtype))
        # The dummy image of a text-only batch keeps the projector in the graph, with a zero gradient.
        return embeddings + (0.0 * vision_tokens_IVD[batch.image_count :]).sum()

    def decode(
        self, embeddings_BLD: torch.Tensor, cache: Any, mask_BK: torch.Tensor, positions_BL: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, L, D] of positions that follow those in ``cache`` (a transformers Cache), for
        generation after ``use_plain_attention``. ``mask_BK``: 1 at the K real positions, old and new, and 0
        at padding."""
        output = self.language_model(
            inputs_embeds=embeddings_BLD,
            attention_mask=mask_BK,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @property
    def head_width(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    @property
    def used_tower_layers(self) -> int:
        # hidden_states[k] is the output of k layers; -1 is the last one's.
        layers: int = self.config.mm_vision_select_layer % (len(self.vision_tower.encoder.layers) + 1)
        return layers

    def used_tower_modules(self) -> list[nn.Module]:
        """The parts of the tower that its selected hidden state depends on."""
        tower = self.vision_tower
        return [tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[: self.used_tower_layers]]


def new_projector(config: MobileVLMConfig) -> LDPv2Projector:
    return LDPv2Projector(config.mm_hidden_size, config.hidden_size, config.mm_vision_tokens_per_side)


def llama_config(config: MobileVLMConfig) -> LlamaConfig:
    """A fresh transformers configuration: two models that share one share its attention implementation."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        initializer_range=config.initializer_range,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation=ATTENTION_NAME,
    )
