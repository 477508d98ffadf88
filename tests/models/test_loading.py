"""Loading complete folders: every layout and dtype, and no tensor that is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignkd.errors import CheckpointError
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import public_name
from alignkd.models.loading import fingerprint, load_model
from tests import tiny
from tests.model_folders import LAYOUTS, TOWER_PREFIX, copy_model, published_tensors, write_weights

FP32 = BuildOptions(torch.float32)


class Allocations(TorchDispatchMode):
    """Notes dtype and elements of every tensor that an operation gives while the mode is on (meta ones hold
    no memory)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta" and not _is_view(result, args):
            self.elements[result.dtype] = self.elements.get(result.dtype, 0) + result.numel()
        return result


def _is_view(result: torch.Tensor, args: tuple[object, ...]) -> bool:
    storages = [value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)]
    return result.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_bit_for_bit(tmp_path: Path, layout: str) -> None:
    folder = copy_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_weights(folder, published_tensors(), layout)
    model = load_model(folder, FP32)
    given = published_tensors()
    assert {public_name(name) for name, _ in model.named_parameters()} == set(given)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[public_name(name)]), name
    assert fingerprint(model) == fingerprint(load_model(tiny.STUDENT, FP32))


def test_only_the_language_model_projector_and_head_train() -> None:
    model = load_model(tiny.STUDENT, FP32)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith("vision_tower.")), name


def test_loading_in_bf16_makes_no_fp32_copy_and_keeps_rotary_frequencies_in_fp32() -> None:
    size = sum(value.numel() for value in published_tensors().values())
    with Allocations() as allocated:
        model = load_model(tiny.STUDENT, BuildOptions(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert size <= allocated.elements[torch.bfloat16] <= 1.1 * size
    # What is read from the file is mapped, not allocated; what is left are rotary frequencies.
    assert allocated.elements.get(torch.float32, 0) < 0.01 * size
    whole = load_model(tiny.STUDENT, FP32)
    assert model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.language_model.rotary_emb.inv_freq, whole.language_model.rotary_emb.inv_freq)
    width, heads = whole.config.hidden_size, whole.config.num_attention_heads
    wanted = 10000.0 ** -(torch.arange(0, width // heads, 2) / (width // heads))
    assert torch.allclose(whole.language_model.rotary_emb.inv_freq, wanted)
    assert model.vision_tower.embeddings.position_ids.tolist() == [list(range(577))]


def test_the_allocation_counter_sees_a_full_copy() -> None:
    size = sum(value.numel() for value in published_tensors().values())
    with Allocations() as allocated:
        load_model(tiny.STUDENT, FP32).to(torch.bfloat16)
    assert allocated.elements[torch.float32] >= size


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path: Path) -> None:
    tensors = published_tensors()
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    tensors["lm_head.weight"] = torch.zeros(601, 48)
    with pytest.raises(CheckpointError) as caught:
        load_model(copy_model(tmp_path / "model", tensors), FP32)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'model'}: 4 tensors do not fit",
        "  missing: model.layers.1.self_attn.q_proj.weight",
        "  missing: model.norm.weight",
        "  unexpected: model.layers.0.self_attn.q_proj.bias",
        "  wrong shape: lm_head.weight is [601, 48], the model needs [600, 48]",
    ]


def test_buffers_of_old_releases_are_ignored(tmp_path: Path) -> None:
    tensors = published_tensors()
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((6,), 7.0)
    tensors[TOWER_PREFIX + "embeddings.position_ids"] = torch.zeros(1, 577, dtype=torch.int64)
    model = load_model(copy_model(tmp_path / "model", tensors), FP32)
    assert fingerprint(model) == fingerprint(load_model(tiny.STUDENT, FP32))
    assert model.language_model.rotary_emb.inv_freq[0] == 1.0
    assert model.vision_tower.embeddings.position_ids[0, -1] == 576


def test_a_config_of_another_size_is_refused_by_its_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: model.layers.2.input_layernorm.weight"):
        load_model(copy_model(tmp_path / "model", num_hidden_layers=3), FP32)


def test_one_changed_value_changes_the_fingerprint(tmp_path: Path) -> None:
    tensors = published_tensors()
    tensors["model.norm.weight"][5] += 1e-6
    changed = load_model(copy_model(tmp_path / "model", tensors), FP32)
    assert fingerprint(changed) != fingerprint(load_model(tiny.STUDENT, FP32))


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "no tensors")]
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = copy_model(tmp_path / "model")
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        load_model(folder, FP32)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config.json: no such file; a model folder needs it"):
        load_model(tmp_path / "nowhere", FP32)
