"""MobileVLM V2: vision tower, projector and language model as functions of the published tensors.

Shapes: L tokens of a sample, D width, H heads, V vision tokens of an image, W words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


class Model:
    """A published checkpoint, in float64."""

    def __init__(self, folder: Path) -> None:
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        self.weights: Weights = {name: value.double() for name, value in tensors.items()}
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tower = folder.parent / self.config["mm_vision_tower"]
        self.tower_config: dict[str, Any] = json.loads((tower / "config.json").read_text())

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        normal = centred / (variance + self.tower_config["layer_norm_eps"]).sqrt()
        return normal * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + self.config["rms_norm_eps"]).sqrt() * self.weights[f"{name}.weight"]

    def vision_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """CLIP up to its last layer but one, without the class token, and the projector LDPv2: [V, D]."""
        tower = "model.vision_tower.vision_tower.vision_model"
        patch = self.weights[f"{tower}.embeddings.patch_embedding.weight"]
        size = patch.shape[-1]
        patches = (
            pixels.double().unfold(1, size, size).unfold(2, size, size)
        )  # [3, rows, columns, size, size]
        embedded = torch.einsum("crkij,dcij->rkd", patches, patch).flatten(0, 1)
        class_token = self.weights[f"{tower}.embeddings.class_embedding"][None]
        x = torch.cat([class_token, embedded])
        x = x + self.weights[f"{tower}.embeddings.position_embedding.weight"]
        x = self.layer_norm(f"{tower}.pre_layrnorm", x)
        layers = self.tower_config["num_hidden_layers"] + 1 + self.config["mm_vision_select_layer"]
        for number in range(layers):
            layer = f"{tower}.encoder.layers.{number}"
            normed = self.layer_norm(f"{layer}.layer_norm1", x)
            x = x + self._tower_attention(f"{layer}.self_attn", normed)
            hidden = self.linear(f"{layer}.mlp.fc1", self.layer_norm(f"{layer}.layer_norm2", x))
            x = x + self.linear(f"{layer}.mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))
        projector = "model.mm_projector"
        hidden = self.linear(f"{projector}.mlp.mlp.0", x[1:])
        hidden = self.linear(f"{projector}.mlp.mlp.2", F.gelu(hidden))
        side = int(len(hidden) ** 0.5)
        # Means of 2 x 2 neighbours, then a 3 x 3 convolution of each channel on its own, with a residual.
        grid = hidden.view(side // 2, 2, side // 2, 2, -1).mean(dim=(1, 3))
        kernel = self.weights[f"{projector}.peg.peg.0.weight"][:, 0]
        padded = F.pad(grid.movedim(-1, 0), (1, 1, 1, 1)).movedim(0, -1)
        out = grid + self.weights[f"{projector}.peg.peg.0.bias"]
        for down in range(3):
            for right in range(3):
                part = padded[down : down + side // 2, right : right + side // 2]
                out = out + part * kernel[:, down, right]
        return out.flatten(0, 1)

    def _tower_attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        heads = self.tower_config["num_attention_heads"]
        query, key, value = (
            self.linear(f"{name}.{part}_proj", x).unflatten(1, (heads, -1)) for part in ("q", "k", "v")
        )
        scores = torch.einsum("lhe,mhe->hlm", query, key) / query.shape[-1] ** 0.5
        mixed = torch.einsum("hlm,mhe->lhe", scores.softmax(-1), value)
        return self.linear(f"{name}.out_proj", mixed.flatten(1))

    def language_model(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input embeddings [L, D] -> logits [L, W], and the attention maps [H, L, L] of the first layer."""
        first = None
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            mixed, maps = self._causal_attention(
                f"{layer}.self_attn", self.rms_norm(f"{layer}.input_layernorm", x)
            )
            first = maps if first is None else first
            x = x + mixed
            normed = self.rms_norm(f"{layer}.post_attention_layernorm", x)
            gate = F.silu(self.linear(f"{layer}.mlp.gate_proj", normed))
            x = x + self.linear(f"{layer}.mlp.down_proj", gate * self.linear(f"{layer}.mlp.up_proj", normed))
        assert first is not None
        return self.linear("lm_head", self.rms_norm("model.norm", x)), first

    def _causal_attention(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads, length = self.config["num_attention_heads"], len(x)
        query, key, value = (
            self.linear(f"{name}.{part}_proj", x).unflatten(1, (heads, -1)) for part in ("q", "k", "v")
        )
        query, key = self._rotated(query), self._rotated(key)
        scores = torch.einsum("lhe,mhe->hlm", query, key) / query.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        maps = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = torch.einsum("hlm,mhe->lhe", maps, value)
        return self.linear(f"{name}.o_proj", mixed.flatten(1)), maps

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions, in fp32 as in every published LLaMA."""
        half = x.shape[-1] // 2
        frequencies = 1.0 / self.config["rope_theta"] ** (torch.arange(0, half).float() / half)
        angles = torch.outer(torch.arange(len(x)).float(), frequencies)[:, None]
        cos, sin = angles.cos().double(), angles.sin().double()
        left, right = x[..., :half], x[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
