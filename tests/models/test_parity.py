"""From PNG and text to logits, attention and vision tokens: equal to the authors' models."""

from __future__ import annotations

import pytest
import torch

from alignkd.data.batch import Batch
from alignkd.losses.attention import text_vision_block
from alignkd.models.building import BuildOptions
from alignkd.models.families.interface import ModelOutputs
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from alignkd.teacher.targets import block_layout
from tests import tiny

IMAGE_CASES = ("plain", "v1", "rounds")


@pytest.fixture(scope="module", params=["student", "teacher"])
def model(request: pytest.FixtureRequest) -> MobileVLM:
    return load_model(tiny.FOLDER / request.param, BuildOptions(torch.float32)).eval()


def name_of(model: MobileVLM) -> str:
    return "student" if model.config.hidden_size == 48 else "teacher"


def block_of(model: MobileVLM, batch: Batch, outputs: ModelOutputs) -> torch.Tensor:
    layout = block_layout(batch, model.facts)
    return text_vision_block(*outputs.first_layer, layout)


@pytest.mark.parametrize("case", IMAGE_CASES)
@torch.no_grad()
def test_a_sample_with_an_image_equals_the_authors_models(model: MobileVLM, case: str) -> None:
    values, name = tiny.expected(), name_of(model)
    batch = tiny.batch_of(case)
    assert batch.image_starts.tolist() == [tiny.CASES[case]["image_token_position"]]
    outputs = model(batch)
    last_vision_token = int(batch.image_starts[0]) + 143
    logits = model.logits(outputs.hidden_BLD[:, last_vision_token:])
    assert torch.allclose(
        outputs.vision_tokens_IVD, tensor(values[f"{case}.{name}_image_features"]), atol=1e-5
    )
    block = tensor(values[f"{case}.{name}_first_attention_block"])
    assert torch.allclose(block_of(model, batch, outputs), block, atol=1e-5, rtol=0)
    assert torch.allclose(logits, tensor(values[f"{case}.{name}_logits_from_last_vision_token"]), atol=1e-4)


@torch.no_grad()
def test_a_sample_without_an_image_equals_the_authors_models(model: MobileVLM) -> None:
    batch = tiny.batch_of("text")
    outputs = model(batch)
    logits = model.logits(outputs.hidden_BLD)
    assert torch.allclose(logits, tensor(tiny.expected()[f"text.{name_of(model)}_logits"]), atol=1e-4)
    assert block_of(model, batch, outputs).numel() == 0


@torch.no_grad()
def test_a_ragged_batch_equals_its_samples_alone(model: MobileVLM) -> None:
    cases = ("text", "rounds", "plain", "v1")
    batch = tiny.batch_of(*cases)
    together = model(batch)
    block = block_of(model, batch, together)
    image = 0
    for row, case in enumerate(cases):
        own_batch = tiny.batch_of(case)
        alone = model(own_batch)
        length = alone.hidden_BLD.shape[1]
        assert torch.allclose(together.hidden_BLD[row, :length], alone.hidden_BLD[0], atol=1e-5)
        if case in IMAGE_CASES:
            own_block = block_of(model, own_batch, alone)
            rows = own_block.shape[2]
            assert torch.allclose(block[image, :, :rows], own_block[0], atol=1e-6)
            assert not block[image, :, rows:].any()
            image += 1


def tensor(array: object) -> torch.Tensor:
    return torch.as_tensor(array)
