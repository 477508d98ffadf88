"""What a written model has beside its parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from alignkd.models.families.processors import read_processor
from alignkd.models.families.transformers_loading import write_model
from tests import vlm

GENERATION = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.2}


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_a_written_model_has_the_source_s_generation_settings_processor_and_template(
    family: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(vlm.folder(family), source)
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    (source / "README.md").write_text("of the source")
    out.mkdir()
    write_model(out, source, parameters_of(source))
    generation = AutoModelForImageTextToText.from_pretrained(out).generation_config
    assert {key: getattr(generation, key) for key in GENERATION} == GENERATION
    ours, theirs = read_processor(out), read_processor(source)
    assert ours.to_dict() == theirs.to_dict()
    assert ours.chat_template == theirs.chat_template
    own = {"model.safetensors", "config.json", "README.md"}
    for path in source.iterdir():
        if path.name not in own:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (out / "README.md").exists()


def test_a_source_without_generation_settings_gets_those_of_its_config(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(vlm.folder("llava"), source)
    (source / "generation_config.json").unlink()
    out.mkdir()
    write_model(out, source, parameters_of(source))
    assert AutoModelForImageTextToText.from_pretrained(out).generation_config.repetition_penalty in (
        None,
        1.0,
    )


def test_buffers_that_belong_to_the_files_are_written_with_the_parameters(tmp_path: Path) -> None:
    """Gemma 4 scales its layers by one, and clips inside its tower."""
    source = vlm.folder("gemma4")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    write_model(tmp_path, source, parameters)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    wanted, found = model.state_dict(), again.state_dict()
    assert {name for name, value in wanted.items() if not found[name].equal(value)} == set()
    scales = [value for name, value in found.items() if name.endswith("layer_scalar")]
    assert scales
    assert all(scale.item() == torch.tensor(0.7) for scale in scales)
