"""Gradient checkpointing recomputes what it should, and keeps random states only where a layer draws."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from tests import model_folders, tiny


@pytest.mark.parametrize(
    ("dropout", "trains_tower", "saves"), [(0.0, True, 0), (0.5, False, 0), (0.5, True, 4)]
)
def test_random_states_are_saved_only_for_a_trained_tower_with_dropout(
    tmp_path: Path, dropout: float, trains_tower: bool, saves: int
) -> None:
    folder = model_folders.copy_model(tmp_path / "model")
    model_folders.change_json(folder / model_folders.TOWER_NAME / "config.json", attention_dropout=dropout)
    model = MobileVLM(read_model_config(folder)).train()
    if trains_tower:
        model.unfreeze_vision_tower()
    model.enable_gradient_checkpointing()
    with patch.object(torch, "get_rng_state", wraps=torch.get_rng_state) as saved:
        model(tiny.batch_of("v1")).hidden_BLD.sum().backward()
    assert saved.call_count == saves  # forward and recomputation of two tower layers


@pytest.mark.parametrize(
    ("every", "recomputed"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])]
)
def test_every_nth_layer_runs_again_and_no_gradient_changes(every: int, recomputed: list[int]) -> None:
    torch.manual_seed(0)
    model = MobileVLM(dataclasses.replace(read_model_config(tiny.STUDENT), num_hidden_layers=5)).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = tiny.batch_of("v1", "text", packing=True)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        outputs = model(batch)
        query, key, _ = outputs.first_layer
        (outputs.hidden_BLD.square().sum() + (query.sum() * key.sum())).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_gradient_checkpointing(every)
    runs = [0] * 5
    for number, layer in enumerate(model.language_model.layers):

        def count(*_: object, number: int = number) -> None:
            runs[number] += 1

        layer.input_layernorm.register_forward_hook(count)
    found = gradients()
    assert [number for number, times in enumerate(runs) if times == 2] == recomputed
    assert sum(runs) == 5 + len(recomputed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
