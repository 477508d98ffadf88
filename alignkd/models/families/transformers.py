"""Any family of the table on transformers' own classes (``AutoModelForImageTextToText``).

Shapes as in ``interface``; P vision tokens of all images of a batch, one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from alignkd.config.dotted import flatten
from alignkd.config.schema import Part
from alignkd.data.batch import Batch
from alignkd.models.attention import (
    ATTENTION_NAME,
    FIRST_ATTENTION_NAME,
    FIRST_MASKED_ATTENTION_NAME,
    MASKED_ATTENTION_NAME,
    FirstLayerCapture,
    packing_of,
)
from alignkd.models.families.interface import (
    LanguageModelHead,
    ModelFacts,
    ModelOutputs,
    VisionLanguageModel,
    keep_activations_between,
)
from alignkd.models.families.table import SOFTMAX, Family

PREFIX = "whole."  # of every parameter: the rest is its name in transformers


class TransformersModel(VisionLanguageModel):
    """``whole`` is transformers' model; its head is replaced by ours, with the same weight."""

    def __init__(self, whole: Any, family: Family, tokens: int) -> None:
        """``tokens``: of the tokenizer; a vocabulary that is padded beyond them is cut."""
        super().__init__()
        self.whole = whole
        self.family = family
        head = lent_head(whole.get_output_embeddings().weight)
        rows = whole.config.get_text_config().vocab_size
        head.used = tokens if tokens < rows else None
        whole.set_output_embeddings(head)
        capture_first_layer(whole)
        self.train_vision_tower = False
        for name in family.tower:
            whole.get_submodule(name).requires_grad_(False)
        for name in family.projector:
            whole.get_submodule(name).requires_grad_(True)
        modules = dict(whole.named_modules())
        for name in family.unused:
            if name in modules:
                modules[name].requires_grad_(False)
        # In their own dtypes, on the host. Not registered: they are what the registered ones are set to.
        self._fresh_buffers = {name: value.cpu().clone() for name, value in whole.named_buffers()}

    @property
    def head(self) -> LanguageModelHead:  # type: ignore[override]  # it lies where transformers looks for it
        head: LanguageModelHead = self.whole.get_output_embeddings()
        return head

    @property
    def facts(self) -> ModelFacts:
        return facts_of(self.whole.config, self.family)

    def public_name(self, name: str) -> str:
        return name.removeprefix(PREFIX)

    def is_projector(self, name: str) -> bool:
        return name.startswith(tuple(f"{PREFIX}{module}." for module in self.family.projector))

    def is_vision_tower(self, name: str) -> bool:
        return name.startswith(tuple(f"{PREFIX}{module}." for module in self.family.tower))

    def part_of(self, name: str) -> Part | None:
        is_unused = name.startswith(tuple(f"{PREFIX}{module}." for module in self.family.unused))
        return None if is_unused else super().part_of(name)

    def unfreeze_vision_tower(self) -> None:
        self.train_vision_tower = True
        for name in self.family.tower:
            self.whole.get_submodule(name).requires_grad_(True)

    def enable_gradient_checkpointing(self, every: int = 1) -> None:
        # Non-reentrant: queries and keys leave the first layer by a side channel, and need their gradients.
        # Random states are kept for dropout only: each layer would copy the device's to the host, and wait.
        # Renamed between transformers 5.17 and 5.23.
        enable = getattr(self.whole, "activation_checkpointing_enable", None)
        (enable or self.whole.gradient_checkpointing_enable)(
            {"use_reentrant": False, "preserve_rng_state": has_dropout(self.whole.config)}
        )
        keep_activations_between(self.whole.get_decoder().layers, every)

    def set_fresh_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """What :meth:`restore_buffers` restores: of a model whose own were built in a wrong dtype."""
        self._fresh_buffers = values

    def restore_buffers(self, device: torch.device | str) -> None:
        for name, value in self._fresh_buffers.items():
            module, _, buffer = name.rpartition(".")
            self.whole.get_submodule(module)._buffers[buffer] = value.to(device, copy=True)

    def forward(self, batch: Batch, patches_IPC: torch.Tensor | None = None) -> ModelOutputs:
        assert patches_IPC is None, "towers are shared by MobileVLMs only"
        features = self.whole.model.get_image_features(**self._tower_inputs(batch), return_dict=True)
        tokens_PD = flat_tokens(features.pooler_output)
        first_layer = FirstLayerCapture()
        output = self.whole.model(
            input_ids=batch.input_ids_BL,
            mm_encoder_outputs={"image": features} if batch.image_count else None,
            use_cache=False,
            first_layer=first_layer,
            **self._text_inputs(batch),
            **self._packed_inputs(batch, tokens_PD),
        )
        hidden_BLD = output.last_hidden_state
        if not batch.image_count:
            # The blank image keeps all of the projector in the graph, with a zero gradient.
            deep = getattr(features, "deepstack_features", None) or ()
            for tokens in (tokens_PD, *map(flat_tokens, deep)):
                hidden_BLD = hidden_BLD + (0.0 * tokens).sum()
        vision_tokens_IVD = padded_by_image(tokens_PD, [span.tokens for span in batch.image_spans])
        return ModelOutputs(hidden_BLD, vision_tokens_IVD, None, first_layer.take())

    def _text_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the family wants beside the ids; without an image, positions are the usual ones."""
        names = self.family.position_inputs if batch.image_count else ()
        inputs = {name: batch.image_inputs[name] for name in names}
        if self.family.marks_images is not None:
            is_image = batch.input_ids_BL == self.whole.config.image_token_id
            inputs[self.family.marks_images] = is_image.long()
        return inputs

    def _packed_inputs(self, batch: Batch, embeddings: torch.Tensor) -> dict[str, Any]:
        """What keeps the samples of a packed row apart."""
        if not batch.segments:
            return {}
        text = self.whole.config.get_text_config()
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return {"position_ids": batch.position_ids_BL, "packing": packing_of(batch, embeddings, head_width)}

    def _tower_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        pixels = batch.pixel_values.to(next(self.whole.parameters()).dtype)
        inputs = {"pixel_values": pixels, **batch.image_inputs}
        return {name: value[None] for name, value in inputs.items()} if self.family.inputs_by_row else inputs


def flat_tokens(pooled: Any) -> torch.Tensor:
    """``pooler_output`` of any family as [P, D]: a tensor [..., V, D], or a list of one per image, tile or
    batch row."""
    parts = [pooled] if isinstance(pooled, torch.Tensor) else pooled
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def padded_by_image(tokens_PD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[P, D] -> [I, V, D], filled up with zeros; ``counts`` has the vision tokens of each image."""
    if not counts:
        # With a graph, as on a rank with images: ZeRO-3 compares the order of modules in backward.
        return tokens_PD[None, :0][:0]
    return pad_sequence(list(torch.split(tokens_PD, counts)), batch_first=True)


def facts_of(config: Any, family: Family) -> ModelFacts:
    """From the configuration of the whole model."""
    text = config.get_text_config()
    softcap = text.final_logit_softcapping if family.has_softcap else None
    return ModelFacts(text.num_attention_heads, text.hidden_size, None, first_window(text), softcap)


def has_dropout(config: Any) -> bool:
    """Whether a part of the model draws random numbers in training: ``attention_dropout``,
    ``drop_path_rate`` and the like."""
    values = flatten(config.to_dict()).items()
    return any(value for key, value in values if "drop" in key.rpartition(".")[2])


def first_window(text: Any) -> int | None:
    """The sliding window of a language model's first softmax layer, if it has one. A model without
    ``layer_types`` has the same window in all layers."""
    types = getattr(text, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(text, "sliding_window", None)
    first = next(name for name in types if name in SOFTMAX)
    return window if first == "sliding_attention" else None


def lent_head(weight: nn.Parameter) -> LanguageModelHead:
    with torch.device("meta"):
        head = LanguageModelHead(1, 1)
    head.weight = weight
    return head


def first_attention_module(whole: Any) -> Any:
    """Of the decoder's first softmax layer. Layers without a softmax, such as those of a linear attention,
    call their module by another name."""
    layers = whole.get_decoder().layers
    return next(layer.self_attn for layer in layers if hasattr(layer, "self_attn"))


def capture_first_layer(whole: Any) -> None:
    """Give the decoder's first softmax layer its own attention function."""
    attention = first_attention_module(whole)
    own = copy.copy(attention.config)
    first = {ATTENTION_NAME: FIRST_ATTENTION_NAME, MASKED_ATTENTION_NAME: FIRST_MASKED_ATTENTION_NAME}
    own._attn_implementation = first[attention.config._attn_implementation]
    attention.config = own


@contextmanager
def eager_attention(whole: Any, family: Family) -> Iterator[None]:
    """transformers' own attention inside, which returns its maps."""
    attention = first_attention_module(whole)
    own, parts = attention.config, attention_of_parts(whole.config, family)
    attention.config = whole.get_decoder().config
    whole.set_attn_implementation(parts | {"text_config": "eager"})
    try:
        yield
    finally:
        whole.set_attn_implementation(parts)
        attention.config = own


def attention_of_parts(config: Any, family: Family) -> dict[str, str]:
    """The argument ``attn_implementation`` that gives the language model alone our attention function."""
    has_window = getattr(config.get_text_config(), "sliding_window", None) is not None
    return attention_with(config, MASKED_ATTENTION_NAME if family.has_masks or has_window else ATTENTION_NAME)


def attention_with(config: Any, own: str) -> dict[str, str]:
    """The same with the attention function ``own``, by its name."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    known = {"text_config": own, "vision_config": "sdpa"}
    return {name: known.get(name, "eager") for name in parts}  # not every tower for sound has SDPA
