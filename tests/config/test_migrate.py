from __future__ import annotations

import copy
from pathlib import Path

import pytest

from alignkd.config import dump_config, load_config, load_run_config
from alignkd.config.migrate import REMOVED, RENAMED, migrate
from alignkd.errors import ConfigError

from .conftest import BASE


def test_old_keys_are_renamed_or_dropped_in_a_copy() -> None:
    old = {
        "distillation": {
            "rows": "prompt_only",
            "positions": "all_text",
            "top_k": 3,
            "fused_head": False,
            "fused_attention": True,
        },
        "run": {"name": "x"},
    }
    before = copy.deepcopy(old)
    assert migrate(old) == {
        "distillation": {"attention_rows": "prompt_only", "logit_positions": "all_text", "top_k": 3},
        "run": {"name": "x"},
    }
    assert old == before


def test_a_configuration_of_today_stays_as_it_is() -> None:
    config = {"distillation": {"attention_rows": "all_text"}, "data": {"sources": [{"file": "a"}]}}
    assert migrate(config) == config
    assert migrate({"distillation": {"rows": "all_text", "attention_rows": "prompt_only"}}) == {
        "distillation": {"attention_rows": "prompt_only"}
    }
    assert migrate({"distillation": 3, "model": None}) == {"distillation": 3, "model": None}


def test_a_run_folder_of_an_older_version_is_read(write, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    overrides = ["distillation.attention_rows=prompt_only", "distillation.logit_positions=all_text"]
    config = load_config(write(BASE), overrides)
    text = dump_config(config)
    for old, new in RENAMED.items():
        new_name = new.rpartition(".")[2]
        assert text.count(f"  {new_name}:") == 1
        text = text.replace(f"  {new_name}:", f"  {old.rpartition('.')[2]}:")
    (run / "config.yaml").write_text(text)
    assert load_run_config(run / "config.yaml") == config
    assert load_run_config(run / "config.yaml", ["run.name=other"]).run.name == "other"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_users_file_with_an_old_key_is_told_the_new_one(write, old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(BASE), [f"{old}=all_text"])
    assert caught.value.problems == [f"{old} = all_text: has been renamed; valid: {new}"]


@pytest.mark.parametrize("key", REMOVED)
def test_a_users_file_with_a_removed_key_is_told_to_delete_it(write, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(BASE), [f"{key}=false"])
    assert caught.value.problems == [f"{key} = false: has been removed; delete this key"]
