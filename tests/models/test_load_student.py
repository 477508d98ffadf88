"""Starting points of a student: a complete folder, a plain LLaMA, or from scratch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.loading import load_student
from tests import tiny
from tests.model_folders import (
    PROJECTOR_PREFIX,
    TOWER,
    TOWER_NAME,
    TOWER_PREFIX,
    copy_model,
    plain_llama,
    published_tensors,
)

FP32 = BuildOptions(torch.float32)
PROJECTOR = {
    PROJECTOR_PREFIX + name
    for name in (
        "mlp.mlp.0.bias",
        "mlp.mlp.0.weight",
        "mlp.mlp.2.bias",
        "mlp.mlp.2.weight",
        "peg.peg.0.bias",
        "peg.peg.0.weight",
    )
}
TOWER_NAMES = {name for name in published_tensors() if name.startswith(TOWER_PREFIX)}


def section(student: Path | str, tower: Path | None = None, config: Path | None = None) -> ModelSection:
    return ModelSection(
        student=str(student),
        vision_tower=None if tower is None else str(tower),
        student_config=None if config is None else str(config),
    )


def tensors_of(model: MobileVLM) -> dict[str, torch.Tensor]:
    return {public_name(name): parameter.data for name, parameter in model.named_parameters()}


def test_a_complete_folder_needs_no_completion() -> None:
    model, completed = load_student(section(tiny.STUDENT), seed=3, options=FP32)
    assert completed == []
    assert torch.equal(tensors_of(model)["lm_head.weight"], published_tensors()["lm_head.weight"])


@pytest.mark.parametrize("tower", [TOWER, tiny.TEACHER], ids=["CLIP", "MobileVLM"])
def test_a_plain_llama_is_completed(tmp_path: Path, tower: Path) -> None:
    model, completed = load_student(section(plain_llama(tmp_path / "llama"), tower), 3, FP32)
    assert set(completed) == TOWER_NAMES | PROJECTOR
    assert completed == sorted(completed)
    tensors, given = tensors_of(model), published_tensors()
    if tower == TOWER:
        clip = torch.load(TOWER / "pytorch_model.bin", weights_only=True)
        given |= {TOWER_PREFIX + name.removeprefix("vision_model."): value for name, value in clip.items()}
    else:
        given |= {name: value for name, value in published_tensors(tower).items() if name in TOWER_NAMES}
    for name in set(tensors) - PROJECTOR:
        assert torch.equal(tensors[name], given[name]), name
    assert model.config.mm_vision_tower == (TOWER_NAME if tower == tiny.TEACHER else TOWER.name)
    assert model.config.vision_tokens == 144


def test_the_text_half_of_a_clip_folder_is_ignored(tmp_path: Path) -> None:
    clip = torch.load(TOWER / "pytorch_model.bin", weights_only=True)
    clip |= {"text_model.final_layer_norm.weight": torch.ones(2), "logit_scale": torch.ones(())}
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.save(clip, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((TOWER / "config.json").read_text())
    _, completed = load_student(section(plain_llama(tmp_path / "llama"), folder), 3, FP32)
    assert set(completed) == TOWER_NAMES | PROJECTOR


def test_the_seed_determines_the_new_projector(tmp_path: Path) -> None:
    llama = section(plain_llama(tmp_path / "llama"), TOWER)
    torch.manual_seed(100)
    state = torch.get_rng_state()
    first, again, other = (tensors_of(load_student(llama, seed, FP32)[0]) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are touched"
    for name in PROJECTOR:
        assert torch.equal(first[name], again[name]), name
        assert not torch.equal(first[name], other[name]), name
        assert 0 < first[name].abs().max() < 1, name


def test_completing_a_llama_initialises_only_the_projector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second, whole model is initialised in fp32."""
    from alignkd.models.families import mobilevlm_loading

    def whole_model(*_: object) -> None:
        raise AssertionError("a language model was built outside of the meta device")

    monkeypatch.setattr(mobilevlm_loading, "LlamaModel", whole_model)
    model, _ = load_student(section(plain_llama(tmp_path / "llama"), TOWER), 3, BuildOptions(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_scratch_takes_only_the_tower_from_disk(tmp_path: Path) -> None:
    facts = plain_llama(tmp_path / "facts")
    (facts / "model.safetensors").unlink()
    scratch = section("scratch", TOWER, facts)
    (model, completed), (again, _), (other, _) = (load_student(scratch, seed, FP32) for seed in (3, 3, 4))
    tensors = tensors_of(model)
    assert set(completed) == set(tensors)
    for name, value in tensors_of(again).items():
        assert torch.equal(value, tensors[name]), name
    for name, value in tensors_of(other).items():
        constant = name in TOWER_NAMES or name.endswith("norm.weight")
        assert torch.equal(value, tensors[name]) == constant, name
    assert tensors["model.norm.weight"].eq(1).all()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        assert tensors[name].std() == pytest.approx(model.config.initializer_range, rel=0.05), name


def test_a_complete_folder_and_a_vision_tower_contradict_each_other() -> None:
    with pytest.raises(CheckpointError, match=r"brings its own tower and projector; remove the key"):
        load_student(section(tiny.STUDENT, TOWER), 0, FP32)


def test_a_plain_llama_without_a_tower_names_the_missing_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name one in model.vision_tower \(a CLIP folder or"):
        load_student(section(plain_llama(tmp_path / "llama")), 0, FP32)


def test_a_mobilevlm_config_without_its_tower_lists_what_is_missing(tmp_path: Path) -> None:
    tensors = {
        name: value for name, value in published_tensors().items() if name not in TOWER_NAMES | PROJECTOR
    }
    with pytest.raises(CheckpointError, match=f"{len(TOWER_NAMES | PROJECTOR)} tensors do not fit") as caught:
        load_student(section(copy_model(tmp_path / "model", tensors)), 0, FP32)
    for name in TOWER_NAMES | PROJECTOR:
        assert f"missing: {name}\n" in str(caught.value) + "\n"


def test_a_tower_of_another_shape_names_both_folders(tmp_path: Path) -> None:
    clip = torch.load(TOWER / "pytorch_model.bin", weights_only=True)
    del clip["vision_model.post_layernorm.bias"]
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.save(clip, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((TOWER / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        load_student(section(plain_llama(tmp_path / "llama"), folder), 0, FP32)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'llama'}, completed with {folder}: 1 tensors do not fit",
        f"  missing: {TOWER_PREFIX}post_layernorm.bias",
    ]
