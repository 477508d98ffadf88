"""A tiny vision tower with the published models' grid of 24 x 24 patches, which llama.cpp's projector needs.

It stands for CLIP: it has learned to see before the teacher meets it, on the labelled digits of the sample
task. Learning that inside a teacher, as in `make demo`, is slow on a CPU with nine times as many patches.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from alignkd.data.sample_task.digits import DigitSet, draw_grid, load_digit_sets
from alignkd.models.saving import write_folder
from alignkd.models.tower import CLIP_MEAN, CLIP_STD, default_preprocessor

IMAGE_SIDE, PATCH = 336, 14
GRID = IMAGE_SIDE // PATCH
WIDTH = 64
LAYERS = 2  # the last one is not used: MobileVLM reads hidden state -2
STEPS, BATCH, LEARNING_RATE = 800, 16, 3e-3
SHARPNESS = 4.0  # of the softmax over digits: a mean over patches starts near zero


def new_tower() -> CLIPVisionModel:
    """Random weights, with positions that are waves. Attention adds nothing: each patch speaks for itself."""
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    tower = CLIPVisionModel(config)
    tower.embeddings.position_embedding.weight.data[1:] = 0.5 * _waves()
    for layer in tower.encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
        nn.init.zeros_(layer.self_attn.out_proj.bias)
    return tower


def _waves() -> torch.Tensor:
    """float32 [patches, WIDTH]: sines and cosines of row and column, half a wave over the image to eight."""
    rows_P, columns_P = (
        torch.arange(GRID * GRID).div(GRID, rounding_mode="floor"),
        torch.arange(GRID**2) % GRID,
    )
    frequencies = math.pi * 2 ** torch.linspace(0, 4, WIDTH // 4)
    angles = [where[:, None] / GRID * frequencies for where in (rows_P, columns_P)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def patches(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [I, 3, S, S] -> the hidden state [I, P, WIDTH] that MobileVLM reads, without attention, whose
    output is zero."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[: LAYERS - 1]:
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    patches_IPC: torch.Tensor = hidden[:, 1:]
    return patches_IPC


def cell_logits(head: nn.Linear, patches_IPC: torch.Tensor) -> torch.Tensor:
    """[I * 4, 10]: what the patches of each cell say about its digit, on average."""
    side = GRID // 2
    logits: torch.Tensor = head(patches_IPC)
    cells = logits.view(-1, 2, side, 2, side, logits.shape[-1]).mean(dim=(2, 4))
    return SHARPNESS * cells.flatten(0, 2)


def draw_batch(
    digits: DigitSet, random: np.random.Generator, images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [I, 3, S, S] of new grids, as after CLIP's preprocessing, and the digits [I * 4] in them."""
    grids = [draw_grid(digits, random) for _ in range(images)]
    grey = torch.from_numpy(np.stack([255 - grid.pixels for grid in grids]))[:, None].float()
    large = nn.functional.interpolate(grey, IMAGE_SIDE, mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (large - mean) / deviation, torch.tensor([grid.digits for grid in grids]).flatten()


def train_tower(tower: CLIPVisionModel, digits: DigitSet, seed: int, steps: int) -> nn.Linear:
    """Teach the tower to name the digit of each cell. Returns the head that names it."""
    head, random = nn.Linear(WIDTH, 10), np.random.default_rng([seed, 30])
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.05)
    for _ in range(steps):
        pixels, labels = draw_batch(digits, random, BATCH)
        loss = nn.functional.cross_entropy(cell_logits(head, patches(tower, pixels)), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return head


def write_tower(folder: Path, seed: int, steps: int = STEPS) -> None:
    """Train a tower on the training digits and write it, as a folder of CLIP. Atomic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = new_tower()
        train_tower(tower, load_digit_sets(seed)[0], seed, steps)

    def write(partial: Path) -> None:
        tower.save_pretrained(partial)
        CLIPImageProcessorPil(**default_preprocessor(IMAGE_SIDE)).save_pretrained(partial)

    write_folder(folder, write, replace=True)
