"""MobileVLM V2 on transformers' LLaMA and CLIP classes: vision tower -> projector -> language model -> head.

Everything that the losses need leaves :meth:`MobileVLM.forward` as :class:`ModelOutputs`; they never see a
model class. Shapes: B rows, L columns, D width, I images (see ``data/batch.py``), P patches and C width of
the vision tower, V vision tokens of an image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from alignkd.data.batch import Batch
from alignkd.losses.fused_head import LogitLosses, Scales, logit_losses
from alignkd.losses.logits import LogitTargets
from alignkd.models.attention import (
    ATTENTION_NAME,
    BlockConsumer,
    BlockLayout,
    BlockRequest,
    text_vision_block,
)
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.projector import LDPv2Projector


class ModelOutputs(NamedTuple):
    """``patches_IPC`` and ``vision_tokens_IVD``: of the tower and the projector, dummy images included.

    A tuple, because ZeRO-3's hooks find tensors in tuples, lists and dicts only.
    """

    hidden_BLD: torch.Tensor  # after the final norm, before the head
    vision_tokens_IVD: torch.Tensor
    patches_IPC: torch.Tensor
    block: torch.Tensor | None  # what the consumer made of the first layer's text x vision block


class LanguageModelHead(nn.Module):
    """The output projection. The logit losses run inside its forward, so that ZeRO-3 gathers its weight like
    any other module's."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(
        self, hidden: torch.Tensor, targets: LogitTargets | None = None, scales: Scales = (1.0, 1.0)
    ) -> torch.Tensor | LogitLosses:
        """Logits [..., vocab], or with ``targets`` what :func:`logit_losses` makes of [N, D]."""
        if targets is None:
            return nn.functional.linear(hidden, self.weight)
        return logit_losses(hidden, self.weight, targets, scales)


class MobileVLM(nn.Module):
    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionModel(
            CLIPVisionConfig(**config.tower_config, attn_implementation="sdpa")
        )
        self.projector = new_projector(config)
        self.language_model = LlamaModel(llama_config(config))
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
        for module in (self.language_model, *([self.vision_tower] if self.train_vision_tower else [])):
            # Renamed between transformers 5.17 and 5.23.
            enable = getattr(module, "activation_checkpointing_enable", None)
            # Non-reentrant: the block leaves layer 0 by a side channel, and its gradient must survive.
            (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(
        self,
        batch: Batch,
        block_consumer: BlockConsumer | None = text_vision_block,
        patches_IPC: torch.Tensor | None = None,
    ) -> ModelOutputs:
        """Run all of the model but the head. The tower and the projector run whatever the batch holds: a rank
        that skipped them would leave the others alone in their collectives.

        ``block_consumer`` gets the first layer's queries and keys. ``patches_IPC``: what an equal tower made
        of the batch's pixels; this one does not run then.
        """
        if patches_IPC is None:
            patches_IPC = self.patches(batch.pixel_values)
        vision_tokens: torch.Tensor = self.projector(patches_IPC)
        request = None
        if block_consumer is not None:
            layout = BlockLayout.of(batch, self.config.vision_tokens)
            request = BlockRequest(layout, block_consumer)
        # Right padding under causal attention: no mask, since no real token sees a later one.
        output = self.language_model(
            inputs_embeds=self.embed(batch, vision_tokens),
            position_ids=batch.position_ids_BL,
            use_cache=False,
            block_request=request,
            segments=batch.segments,
        )
        block = None if request is None else request.answer
        return ModelOutputs(output.last_hidden_state, vision_tokens, patches_IPC, block)

    def vision_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [I, 3, S, S] -> vision tokens [I, V, D]."""
        tokens: torch.Tensor = self.projector(self.patches(pixel_values))
        return tokens

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [I, 3, S, S] -> the tower's selected hidden states [I, P, C]."""
        with torch.set_grad_enabled(self.train_vision_tower and torch.is_grad_enabled()):
            pixels = pixel_values.to(self.vision_tower.embeddings.patch_embedding.weight.dtype)
            hidden = self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixels))
            for layer in self.vision_tower.encoder.layers[: self.used_tower_layers]:
                hidden = layer(hidden, attention_mask=None)
            patches: torch.Tensor = hidden[:, 1:]  # without the class token
        return patches

    def embed(self, batch: Batch, vision_tokens_IVD: torch.Tensor) -> torch.Tensor:
        """Input embeddings [B, L, D]: token embeddings, with the vision tokens put into their places."""
        embeddings: torch.Tensor = self.language_model.embed_tokens(batch.input_ids_BL.clamp(min=0))
        real = vision_tokens_IVD[: batch.image_count]
        offsets = torch.arange(self.config.vision_tokens, device=embeddings.device)
        columns_IV = batch.image_starts[:, None] + offsets
        rows_IV = batch.image_samples[:, None].expand_as(columns_IV)
        embeddings = embeddings.index_put((rows_IV, columns_IV), real.to(embeddings.dtype))
        # The dummy image of a text-only batch keeps the projector in the graph, with a zero gradient.
        return embeddings + (0.0 * vision_tokens_IVD[batch.image_count :]).sum()

    def decode(self, embeddings_BLD: torch.Tensor, cache: Any) -> torch.Tensor:
        """Hidden states of new positions behind those in ``cache`` (a transformers Cache), for generation."""
        output = self.language_model(inputs_embeds=embeddings_BLD, past_key_values=cache, use_cache=True)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @property
    def used_tower_layers(self) -> int:
        # hidden_states[k] is the output of k layers; -1 is the last one's.
        layers: int = self.config.mm_vision_select_layer % (len(self.vision_tower.encoder.layers) + 1)
        return layers

    def used_tower_modules(self) -> list[nn.Module]:
        """What of the tower decides its selected hidden state."""
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
