"""MobileVLM V2 on transformers' LLaMA and CLIP classes: vision tower -> projector -> language model -> head.

Shapes: B rows, L columns, D width, I images (see ``data/batch.py``), P patches and C width of the
vision tower, V vision tokens of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alignkd.data.batch import Batch
from alignkd.models.attention import (
    ATTENTION_NAME,
    FirstLayerCapture,
    capture_first_layer,
    packing_of,
)
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.families.interface import (
    LanguageModelHead,
    ModelFacts,
    ModelOutputs,
    VisionLanguageModel,
    keep_activations_between,
)
from alignkd.models.projector import LDPv2Projector

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
PREFIXES = {  # ours -> published; the first match counts
    "vision_tower.": TOWER_PREFIX,
    "projector.": PROJECTOR_PREFIX,
    "head.": "lm_head.",
    "language_model.": "model.",
}


class MobileVLM(VisionLanguageModel):
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

    @property
    def facts(self) -> ModelFacts:
        return facts_of(self.config)

    def public_name(self, name: str) -> str:
        return public_name(name)

    def is_projector(self, name: str) -> bool:
        return name.startswith("projector.")

    def is_vision_tower(self, name: str) -> bool:
        return name.startswith("vision_tower.")

    def freeze_vision_tower(self) -> None:
        self.vision_tower.requires_grad_(False)
        self.train_vision_tower = False

    def unfreeze_vision_tower(self) -> None:
        """Train the tower's used layers (the ones after the selected hidden state never get a gradient)."""
        self.train_vision_tower = True
        for module in self.used_tower_modules():
            module.requires_grad_(True)

    def enable_gradient_checkpointing(self, every: int = 1) -> None:
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
        keep_activations_between(self.language_model.layers, every)

    def restore_buffers(self, device: torch.device | str) -> None:
        rotary = self.language_model.rotary_emb
        with torch.device("cpu"):
            fresh = LlamaRotaryEmbedding(llama_config(self.config))
        rotary.inv_freq = fresh.inv_freq.to(device)
        rotary.original_inv_freq = fresh.original_inv_freq.to(device)
        embeddings = self.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]

    def forward(self, batch: Batch, patches_IPC: torch.Tensor | None = None) -> ModelOutputs:
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


def facts_of(config: MobileVLMConfig) -> ModelFacts:
    return ModelFacts(config.num_attention_heads, config.hidden_size, config.vision_tokens)


def public_name(name: str) -> str:
    """The name of a tensor in the published format."""
    for ours, published in PREFIXES.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise AssertionError(f"no published name for {name}")


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
