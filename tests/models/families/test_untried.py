"""Families that are not in the table: what is found in them, and what the check at load refuses."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.errors import CheckpointError
from alignkd.models.building import BuildOptions
from alignkd.models.families import transformers, untried
from alignkd.models.families.interface import ModelFacts
from alignkd.models.families.table import FAMILIES, Family
from alignkd.models.loading import load_model
from tests import vlm
from tests.model_folders import change_json
from tests.vlm_untried import UNTRIED

FP32 = BuildOptions(torch.float32)


@pytest.mark.parametrize("name", vlm.FAMILIES)
def test_what_is_found_in_a_family_of_the_table_is_what_its_row_says(name: str) -> None:
    row = FAMILIES[name]
    found = untried._found(vlm.folder(name), Family(name, (), (), tried=False))
    assert found.tower == row.tower
    assert found.inputs_by_row == row.inputs_by_row
    assert set(row.position_inputs) <= set(found.position_inputs)
    assert found.marks_images in (row.marks_images, *untried.MARKS)
    assert found.has_softcap == row.has_softcap
    assert set(found.projector) <= set(row.projector)
    assert set(found.unused) <= set(row.unused)


@pytest.mark.parametrize("name", UNTRIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_untried_family_is_admitted_with_a_warning(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(vlm.folder(name), BuildOptions(dtype))
    assert f"{name} is untried" in caplog.text
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(map(model.is_projector, trained))
    assert not any("vision_tower" in key for key in trained)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError, match="is untried, and is refused: ") as caught:
        load_model(folder, FP32)
    return str(caught.value).partition("refused: ")[2]


def last_layer(whole: Any) -> Any:
    return whole.get_decoder().layers[-1].self_attn


def backwards(real: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    return lambda pooled: real(pooled).flip(0)


def with_softcap(real: Callable[..., ModelFacts]) -> Callable[..., ModelFacts]:
    return lambda *given: replace(real(*given), softcap=1.0)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("first_attention_module", lambda _: last_layer, "attention of the first softmax layer"),
        ("flat_tokens", backwards, "vision tokens"),
        ("facts_of", with_softcap, "logits"),
    ],
)
def test_a_model_that_is_not_read_rightly_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Any, found: str
) -> None:
    monkeypatch.setattr(transformers, name, change(getattr(transformers, name)))
    assert refusal(vlm.folder("llava_next")) == f"these differ from transformers' own: {found}"


def test_positions_that_would_be_wrong_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = untried._with_inputs
    monkeypatch.setattr(untried, "_with_inputs", lambda *found: replace(real(*found), position_inputs=()))
    assert "logits" in refusal(vlm.folder("qwen2_vl"))


def test_what_was_not_found_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(vlm.folder("llava_next"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert refusal(folder).startswith("a sample could not be run (UserError: ")
    model = vlm.folder("llava_next")
    monkeypatch.setattr(untried, "_arguments", lambda _: {"mm_encoder_outputs", "pixel_values"})
    assert refusal(model) == "its vision tower takes no image_sizes, which is what its processor makes"
    monkeypatch.setattr(untried, "_arguments", lambda _: set())
    assert refusal(model) == "its model takes no features of images that were computed before"
    change_json(folder / "config.json", model_type="vipllava_of_mine")
    with pytest.raises(CheckpointError, match="transformers cannot read its config"):
        load_model(folder, FP32)
