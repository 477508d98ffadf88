"""Gradient checkpointing keeps random states only where a layer draws."""

from __future__ import annotations

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
