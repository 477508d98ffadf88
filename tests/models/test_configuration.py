"""Reading the configuration of a model folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.initialization import no_init_weights

from alignkd.errors import CheckpointError
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM
from tests import tiny
from tests.model_folders import change_json, copy_model, plain_llama

PUBLISHED: dict[str, Any] = {
    "model_type": "mobilevlm",
    "architectures": ["MobileLlamaForCausalLM"],
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "mm_projector_type": "ldpnetv2",
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vision_tower_type": "clip",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
SIZES = [
    (1_674_121_216, (2048, 5632, 24, 16, 2048, 1e-6), {}),
    # The 3B file carries left-over keys of another trainer.
    (3_014_273_536, (2560, 6912, 32, 32, 2048, 1e-6), {"n_head": 16, "n_embd": 1024}),
    (7_062_943_744, (4096, 11008, 32, 32, 4096, 1e-5), {}),
]
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@pytest.mark.parametrize(("parameters", "shape", "left_over"), SIZES, ids=["1.7B", "3B", "7B"])
def test_published_configurations_give_the_published_sizes(
    tmp_path: Path, parameters: int, shape: tuple[Any, ...], left_over: dict[str, Any]
) -> None:
    raw = {**PUBLISHED, **dict(zip(SHAPE_KEYS, shape, strict=True)), **left_over}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_model_config(tmp_path)
    with torch.device("meta"), no_init_weights():
        model = MobileVLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(parameter.numel() for parameter in model.vision_tower.parameters()) == 303_507_456
    assert config.vision_tokens == 144
    assert config.preprocessor_config["crop_size"] == {"height": 336, "width": 336}


def test_the_fixture_configuration_is_read_completely() -> None:
    config = read_model_config(tiny.STUDENT)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 4, 4)
    assert (config.mm_vision_select_layer, config.vision_tokens) == (-2, 144)
    assert config.tower_config["hidden_size"] == config.mm_hidden_size == 32
    given = json.loads((tiny.STUDENT / "config.json").read_text())
    assert {key: config.raw[key] for key in given} == given


def test_the_side_of_the_pooled_grid_can_be_configured(tmp_path: Path) -> None:
    config = read_model_config(copy_model(tmp_path / "model", mm_vision_tokens_per_side=4))
    assert config.vision_tokens == 16
    features = torch.randn(2, 576, 32)
    assert MobileVLM(config).projector(features).shape == (2, 16, 48)


def test_rope_theta_is_read_from_rope_parameters_too(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    change_json(folder / "config.json", drop=("rope_theta",), rope_parameters=rope)
    config = read_model_config(folder)
    assert config.rope_theta == 500000.0
    assert config.raw["rope_theta"] == 500000.0, "older readers look there"
    change_json(folder / "config.json", drop=("rope_parameters",))
    assert read_model_config(folder).rope_theta == 10000.0


def test_a_plain_llama_gets_the_published_vision_keys(tmp_path: Path) -> None:
    raw = read_model_config(plain_llama(tmp_path / "llama"), tiny.FOLDER / "openai/clip-tiny-patch14-336").raw
    for key in set(PUBLISHED) - {"vocab_size", "mm_hidden_size", "mm_vision_tower"}:
        assert raw[key] == PUBLISHED[key], key
    assert (raw["mm_hidden_size"], raw["mm_vision_tower"]) == (32, "clip-tiny-patch14-336")


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({"mm_projector_type": "ldpnet"}, "`mm_projector_type` is 'ldpnet'; only 'ldpnetv2' is supported"),
    ({"mm_vision_select_feature": "cls_patch"}, "only 'patch' is supported"),
    ({"mm_use_im_start_end": True}, "`mm_use_im_start_end` is True; only False is supported"),
    ({"mm_use_im_patch_token": True}, "`mm_use_im_patch_token` is True"),
    ({"vision_tower_type": "siglip"}, "`vision_tower_type` is 'siglip'; only 'clip'"),
    ({"tie_word_embeddings": True}, "`tie_word_embeddings` is True"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_scaling` is {"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "`rope_parameters.rope_type` is 'yarn'"),
    ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu'"),
    ({"attention_bias": True}, "`attention_bias` is True"),
    ({"mlp_bias": True}, "`mlp_bias` is True"),
    ({"model_type": "qwen2"}, "`model_type` is 'qwen2'; only 'llama' and 'mobilevlm' are supported"),
    ({"vocab_size": "600"}, "`vocab_size` is '600'; it must be a positive number"),
    ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; it must be a positive number"),
    ({"num_attention_heads": 5}, "must be a multiple of `num_attention_heads` 5"),
    ({"num_key_value_heads": 3}, "`num_key_value_heads` 3"),
    ({"head_dim": 16}, "`head_dim` is 16; only hidden_size / num_attention_heads is supported"),
    ({"mm_hidden_size": 1024}, "`mm_hidden_size` is 1024, the tower's width is 32"),
    ({"mm_vision_tokens_per_side": 25}, "is 25; valid: 1 to 24 (the tower's patches per side)"),
    ({"mm_vision_tokens_per_side": "12"}, "is '12'; valid: 1 to 24"),
    ({"mm_vision_select_layer": -5}, "`mm_vision_select_layer` is -5; valid: -4 to 3"),
]


@pytest.mark.parametrize(("changes", "message"), VARIANTS, ids=lambda value: str(value)[:40])
def test_an_unsupported_variant_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = copy_model(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError) as caught:
        read_model_config(folder)
    assert message in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_all_refused_variants_are_named_at_once(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model", hidden_act="gelu", tie_word_embeddings=True, vocab_size=-1)
    change_json(folder / "config.json", drop=("rms_norm_eps", "intermediate_size"))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(folder)
    for part in ("`intermediate_size` is missing", "`rms_norm_eps` is missing", "gelu", "True", "vocab_size"):
        assert part in str(caught.value)


def test_reading_a_configuration_imports_no_torch() -> None:
    """So that `alignkd launch --dry-run` answers at once on a login node."""
    program = (
        "import sys; import alignkd.models.configuration, alignkd.models.agreement as agreement;"
        "from alignkd.config.schema import ModelSection;"
        f"section = ModelSection(teacher={str(tiny.TEACHER)!r}, student={str(tiny.STUDENT)!r});"
        "assert agreement.check_agreement(section, 16) == [];"
        "assert not {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules), 'too much imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
