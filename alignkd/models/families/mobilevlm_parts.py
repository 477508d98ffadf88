"""The parts of a MobileVLM that a cache of its answers does not replace.

Vision tokens and the queries and keys of the first layer are computed anew: they are cheap, and would take
more room than the hidden states. So a rank holds the vision tower, the projector, the embeddings, the norm,
query and key projections of layer 0, and the head, unless its results are cached; all other weights are never
read.

Shapes as in :mod:`alignkd.models.families.mobilevlm`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb

from alignkd.data.batch import Batch
from alignkd.models.attention import FirstLayerAttention
from alignkd.models.building import BuildOptions
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.interface import ModelOutputs
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.families.mobilevlm_loading import fill
from alignkd.models.weight_files import WeightFiles


class MobileVLMParts(MobileVLM):
    """``config`` is the whole model's; its forward gives no hidden states. Without a head unless
    ``has_head``."""

    def __init__(self, config: MobileVLMConfig, has_head: bool = True) -> None:
        super().__init__(replace(config, num_hidden_layers=1))
        layer = self.first_layer
        del layer.mlp, layer.post_attention_layernorm, layer.self_attn.v_proj, layer.self_attn.o_proj
        del self.language_model.norm
        if not has_head:
            del self.head

    @property
    def first_layer(self) -> LlamaDecoderLayer:
        return cast(LlamaDecoderLayer, self.language_model.layers[0])

    def forward(self, batch: Batch, patches_IPC: torch.Tensor | None = None) -> ModelOutputs:
        """``hidden_BLD`` is empty: [0, 0, D]."""
        if patches_IPC is None:
            patches_IPC = self.patches(batch.pixel_values)
        vision_tokens_IVD: torch.Tensor = self.projector(patches_IPC)
        embeddings_BLD = self.embed(batch, vision_tokens_IVD)
        first_layer = self._queries_and_keys(embeddings_BLD, batch.position_ids_BL)
        return ModelOutputs(embeddings_BLD[:0, :0], vision_tokens_IVD, patches_IPC, first_layer)

    def _queries_and_keys(
        self, embeddings_BLD: torch.Tensor, position_ids_BL: torch.Tensor | None
    ) -> FirstLayerAttention:
        """As transformers' layer 0 computes them, operation by operation: the same bits."""
        if position_ids_BL is None:
            position_ids_BL = torch.arange(embeddings_BLD.shape[1], device=embeddings_BLD.device)[None]
        cosines_and_sines = self.language_model.rotary_emb(embeddings_BLD, position_ids=position_ids_BL)
        layer = self.first_layer
        attention: LlamaAttention = layer.self_attn
        hidden_BLD = layer.input_layernorm(embeddings_BLD)
        of_heads = (*hidden_BLD.shape[:-1], -1, attention.head_dim)
        query_BHLE = attention.q_proj(hidden_BLD).view(of_heads).transpose(1, 2)
        key_BGLE = attention.k_proj(hidden_BLD).view(of_heads).transpose(1, 2)
        query_BHLE, key_BGLE = apply_rotary_pos_emb(query_BHLE, key_BGLE, *cosines_and_sines)
        return FirstLayerAttention(query_BHLE, key_BGLE, float(attention.scaling))


def load_parts(folder: Path | str, options: BuildOptions, has_head: bool = True) -> MobileVLMParts:
    """The parts from a complete MobileVLM folder. Raises CheckpointError listing every tensor that is missing
    or has another shape."""
    config = read_model_config(folder)
    files = WeightFiles(Path(folder))
    with torch.device("meta"), no_init_weights():
        model = MobileVLMParts(config, has_head).to(options.dtype)
    model.to_empty(device=options.device)
    held = {model.public_name(name) for name, _ in model.named_parameters()}
    sources = {name: files.read for name in files.names() if name in held}
    fill(model, sources, files.shape, options, str(folder))
    model.restore_buffers(options.device)
    return model
