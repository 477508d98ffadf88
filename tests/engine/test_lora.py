"""LoRA students: what is trained, saved, resumed and exported, beside a teacher that ZeRO-3 shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import alignkd
from alignkd.checkpoint.export import export_lora, export_run
from alignkd.config.schema import LoraSection
from alignkd.errors import UserError
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model
from alignkd.models.lora import LOW_RANK, add_lora, merged
from alignkd.probe import run_probe_of_run
from alignkd.run_folder.checkpoints import committed_steps
from tests import tiny, vlm
from tests.engine.test_trained_parts import part_by_name
from tests.engine.test_training_run import same_but_for_times, train_run
from tests.ranks import RankPool

LORA = {"rank": 4, "alpha": 8}
CASES = [("mobilevlm", 2), ("smolvlm", 2), ("smolvlm", 3)]


def write_run(out: Path, family: str, **changes: Any) -> Path:
    changes = {"student__lora": LORA, "student__train": ["language_model"], **changes}
    if family == "mobilevlm":
        return tiny.write_run(out, 2, **changes)
    return vlm.write_run(out, 2, family, **changes)


def start_of(family: str) -> dict[str, torch.Tensor]:
    if family == "mobilevlm":
        return dict(torch.load(tiny.STUDENT / "pytorch_model.bin", weights_only=True))
    return load_file(vlm.folder(family) / "model.safetensors")


def run_and_resumed(two_ranks: RankPool, out: Path, family: str, stage: int) -> tuple[Path, Path]:
    whole = write_run(out / "whole", family, student__zero_stage=stage)
    assert two_ranks.run(train_run, str(whole)) == [0, 0]
    stopped = out / "stopped"
    tiny.copy_untrained(whole, stopped)
    assert two_ranks.run(train_run, str(stopped), 3, "usr1") == [85, 85]
    assert committed_steps(stopped)[0] == 3
    assert two_ranks.run(train_run, str(stopped)) == [0, 0]
    return whole, stopped


def logits_with_adapters(folder: Path, adapters: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """Of a text, by transformers and, with ``adapters``, peft."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if adapters is not None:
        model = PeftModel.from_pretrained(model, adapters)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize(("family", "stage"), CASES)
def test_adapters_are_trained_resumed_bit_by_bit_and_exported_merged_or_alone(
    two_ranks: RankPool, tmp_path: Path, family: str, stage: int
) -> None:
    whole, stopped = run_and_resumed(two_ranks, tmp_path, family, stage)
    same_but_for_times(stopped, whole)
    after, before = load_file(whole / "student" / "model.safetensors"), start_of(family)
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not value.equal(before[name].to(value.dtype))}
    assert {part_by_name(name) for name in moved} == {"language_model"}
    assert {name.split(".")[-2] for name in moved} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    export_run(whole, tmp_path / "later", None, "safetensors")
    assert alignkd.load(whole).fingerprint() == alignkd.load(whole / "student").fingerprint()
    for name, value in load_file(tmp_path / "later" / "model.safetensors").items():
        assert value.equal(after[name]), name

    probed = run_probe_of_run(whole, 2)
    assert all(probed.gradient_norms[term] > 0 for term in ("ce", "reverse_kl", "attention"))

    export_lora(whole, tmp_path / "alone", None)
    adapters = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert len(adapters) == 2 * len(moved)
    if family == "smolvlm":
        ids = torch.tensor([[5, 60, 70, 80]])
        ours = logits_with_adapters(whole / "student", None, ids)
        base = vlm.folder(family)
        assert torch.allclose(logits_with_adapters(base, tmp_path / "alone", ids), ours, atol=1e-4)
        assert not torch.allclose(logits_with_adapters(base, None, ids), ours, atol=1e-3)


def test_a_run_that_trains_the_projector_or_the_tower_too_has_no_adapters_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "mobilevlm", student__train=None)
    with pytest.raises(UserError, match=r"only with student.lora, student.train = \[language_model\] and"):
        export_lora(run, tmp_path / "alone", None)
    tower = write_run(tmp_path / "tower", "mobilevlm", training__train_vision_tower=True)
    with pytest.raises(UserError, match=r"training.train_vision_tower = false; valid here"):
        export_lora(tower, tmp_path / "alone", None)
    with pytest.raises(UserError, match="not a run folder"):
        export_lora(tmp_path, tmp_path / "alone", None)


def test_merging_is_the_sum_and_leaves_the_other_tensors_alone() -> None:
    model = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    lora = LoraSection(rank=3, alpha=12)
    add_lora(model, lora, seed=1)
    now = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in now if not name.endswith(LOW_RANK)} == {
        name for name in trained if "projector" in name
    }
    fresh = merged(dict(model.named_parameters()), lora)
    assert fresh.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in fresh.items())
    layer = model.language_model.layers[0].mlp.up_proj
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert down.shape[0] == 3
    with torch.no_grad():
        up.fill_(0.5)
    name = "language_model.layers.0.mlp.up_proj.weight"
    found = merged(dict(model.named_parameters()), lora)[name]
    assert torch.allclose(found, before[name] + 4 * 0.5 * down.sum(0), atol=1e-6)
    hidden = torch.randn(2, layer.in_features)
    assert torch.allclose(layer(hidden), hidden @ found.T, atol=1e-5)


def test_a_tower_for_sound_gets_no_adapters() -> None:
    model = load_model(vlm.folder("gemma4"), BuildOptions(torch.float32))
    sound = ("whole.model.audio_tower.", "whole.model.embed_audio.")
    assert any(name.startswith(sound) for name, _ in model.named_parameters())
    add_lora(model, LoraSection(), seed=1)
    adapters = {name for name, _ in model.named_parameters() if name.endswith(LOW_RANK)}
    assert adapters
    assert {name for name in adapters if "model.language_model.layers." not in name} == {
        f"whole.model.language_model.per_layer_model_projection{end}" for end in LOW_RANK
    }
    assert not any(value.requires_grad for name, value in model.named_parameters() if name.startswith(sound))


def test_adapters_begin_alike_for_a_seed_and_leave_torchs_generator_alone() -> None:
    found = []
    for seed in (1, 1, 2):
        model = load_model(tiny.STUDENT, BuildOptions(torch.bfloat16))
        before = torch.get_rng_state()
        add_lora(model, LoraSection(), seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.language_model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])
    assert found[0].dtype == torch.bfloat16
