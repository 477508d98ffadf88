"""What a written model has beside its parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from alignkd.models.families.transformers_loading import write_model
from tests import vlm


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
