"""Which folders are admitted, by their config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.agreement import untried_notes
from alignkd.models.families.table import FAMILIES, family_name, family_of
from tests import tiny


def folder(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_mobilevlm_and_plain_llama_are_not_in_the_table(tmp_path: Path) -> None:
    assert family_of(tiny.STUDENT) is None
    assert family_of(folder(tmp_path, model_type="llama")) is None
    assert family_of(folder(tmp_path, hidden_size=3)) is None
    assert family_name(tiny.STUDENT) == "mobilevlm"


def test_a_family_is_found_by_its_name(tmp_path: Path) -> None:
    for name in FAMILIES:
        assert family_name(folder(tmp_path, model_type=name)) == name


def test_a_model_that_looks_like_those_of_the_table_is_untried(tmp_path: Path) -> None:
    config = {"text_config": {"layer_types": ["conv", "full_attention"]}, "vision_config": {}}
    found = family_of(folder(tmp_path, model_type="new_vl", image_token_index=7, **config))
    assert found is not None
    assert found.model_type == family_name(tmp_path) == "new_vl"
    assert not found.tried
    note = f"{tmp_path}: new_vl is untried; "
    section = ModelSection(teacher=str(tmp_path), student=str(tmp_path))
    assert [line.startswith(note) for line in untried_notes(section)] == [True]
    assert untried_notes(ModelSection(teacher=str(tiny.TEACHER), student=str(tmp_path / "none"))) == []


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "paligemma"}, "marks the answer as a prefix"),
        ({"model_type": "bert"}, "supported: mobilevlm, llava"),
        ({"model_type": "bert"}, "missing: text_config, vision_config, image_token_id"),
        ({"model_type": "other", "text_config": {}, "vision_config": {}}, "missing: image_token_id"),
        ({"model_type": "lfm2_vl"}, "torchvision only"),
        ({"model_type": "fast_vlm"}, "timm's"),
        ({"model_type": "llava", "auto_map": {"AutoModel": "x.Y"}}, "never run"),
        ({"model_type": "internvl", "text_config": {"model_type": "gpt_oss"}}, "attention sinks"),
        ({"model_type": "llava", "text_config": {"attn_logit_softcapping": 50.0}}, "softcapping"),
        (
            {"model_type": "llava", "text_config": {"layer_types": ["linear_attention"]}},
            "no layer with",
        ),
        ({"model_type": "qwen2_5_vl", "attn_logit_softcapping": 50.0}, "softcapping"),
    ],
)
def test_what_is_refused_is_refused_by_name(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        family_of(folder(tmp_path, **config))
    assert str(tmp_path / "config.json") in str(caught.value)
