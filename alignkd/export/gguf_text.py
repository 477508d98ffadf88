"""``text.gguf``: the language model of a MobileVLM folder as llama.cpp's ``llama`` architecture.

Names, keys and the order of rows in query and key weights as in llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from alignkd.data.templates import SYSTEM_SENTENCE
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.export.gguf_file import GgufTensor, StoredType, Value
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.weight_files import WeightFiles

ARCHITECTURE = "llama"
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}  # llama.h, enum llama_ftype
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Template v1 (data/templates.py). The built-in "vicuna" has newlines where v1 has spaces. llama.cpp programs
# put a marker like <__media__> into the text; v1 has a newline behind a single image in front.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    f"{SYSTEM_SENTENCE} "
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}</s>"
    "{% elif message.role == 'user' %}USER: "
    "{% set parts = message.content.split('__>') %}"
    "{% if message.content.startswith('<__media') and parts | length == 2 %}"
    "{{ parts[0] }}__>{{ '\\n' }}{{ parts[1] | trim }}"
    "{% else %}{{ message.content }}{% endif %}"
    " ASSISTANT:"
    "{% endif %}{% endfor %}"
)


def text_names(config: MobileVLMConfig) -> dict[str, str]:
    """Published name -> name in the file."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(config.num_hidden_layers):
        for published, ours in LAYER_NAMES.items():
            names[f"model.layers.{layer}.{published}.weight"] = f"blk.{layer}.{ours}.weight"
    return names


def text_tensors(config: MobileVLMConfig, files: WeightFiles, quantize: StoredType) -> Iterator[GgufTensor]:
    """Matrices in ``quantize``, norms in f32. With q4_0 the head stays at q8_0: its error goes straight
    into the logits (llama.cpp's own quantiser keeps it at 6 bits)."""
    for published, name in text_names(config).items():
        shape = files.shape(published)
        stored: StoredType = "f32" if len(shape) == 1 else quantize
        if name == "output.weight" and quantize == "q4_0":
            stored = "q8_0"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = name.split(".")[-2]
        read = partial(_read, files, published, heads.get(part))
        yield GgufTensor(name, shape, stored, read)


def _read(files: WeightFiles, name: str, heads: int | None) -> torch.Tensor:
    weight = files.read(name)
    return weight if heads is None else rotary_order(weight, heads)


def rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * width, D] with each head's rows reordered: llama.cpp rotates neighbouring rows (2i, 2i + 1),
    transformers rows i and i + width / 2."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def text_metadata(
    config: MobileVLMConfig, tokenizer: SentencePieceTokenizer, name: str, quantize: StoredType
) -> dict[str, Value]:
    width = config.hidden_size // config.num_attention_heads
    return {
        "general.name": name,
        "general.file_type": FILE_TYPES[quantize],
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": width,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        **_vocabulary(tokenizer, config.vocab_size),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _vocabulary(tokenizer: SentencePieceTokenizer, size: int) -> dict[str, Value]:
    """The tokenizer's pieces. A model may have more ids than its tokenizer: unused ones fill up."""
    pieces = tokenizer.pieces()
    unused = [f"<unused_{number}>" for number in range(len(pieces), size)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces] + unused,
        "tokenizer.ggml.scores": [piece.score for piece in pieces] + [-1000.0] * len(unused),
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces] + [5] * len(unused),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_id,
        "tokenizer.ggml.padding_token_id": tokenizer.unk_id,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
