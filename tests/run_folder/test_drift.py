from __future__ import annotations

import copy
import itertools
from pathlib import Path

from alignkd.run_folder.drift import (
    ANY,
    allowed_changes,
    config_drift,
    conversion_problem,
    must_convert,
    with_accepted,
)
from alignkd.run_folder.paths import RunPaths

CONFIG = {
    "run": {"name": "a"},
    "data": {"workers": 2, "sources": [{"file": "/a/x.json", "image_folder": "/a", "template": "v1"}]},
    "training": {"learning_rate": 1e-4, "seed": 0},
    "distillation": {"weights": {"logits": 1.0}},
}


def changed(*path: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return config


def test_equal_configurations_do_not_drift() -> None:
    assert config_drift(CONFIG, copy.deepcopy(CONFIG), {}) == []


def test_a_difference_shows_key_and_both_values() -> None:
    (problem,) = config_drift(CONFIG, changed("training", "learning_rate", value=2e-4), {})
    assert "training.learning_rate" in problem
    assert "0.0001" in problem
    assert "0.0002" in problem


def test_a_checkpoint_without_a_balance_has_fixed_weights() -> None:
    now = copy.deepcopy(CONFIG)
    now["distillation"] |= {"balance": "fixed", "balance_every": 100}
    assert config_drift(CONFIG, now, {}) == []
    now["distillation"]["balance"] = "learned"
    assert config_drift(CONFIG, now, {}) == [
        "distillation.balance: the checkpoint has 'fixed', the run has 'learned'"
    ]
    assert config_drift(CONFIG, now, {"distillation.balance": "learned"}) == []


def test_where_the_cache_is_may_change_but_not_its_form() -> None:
    now = CONFIG | {"teacher": {"placement": "cached", "cache": "/c", "cache_form": "exact"}}
    assert config_drift(CONFIG, now, {}) == []  # a checkpoint of an older version
    now["teacher"]["cache_form"] = "fp8"
    assert config_drift(CONFIG, now, {}) == [
        "teacher.cache_form: the checkpoint has 'exact', the run has 'fp8'"
    ]


def with_teacher(placement: str, form: str, top_k: int = 64) -> dict:
    return CONFIG | {"teacher": {"placement": placement, "cache_form": form, "cache_top_k": top_k}}


def test_a_form_counts_only_where_a_cache_is_read_and_a_number_of_tokens_only_where_they_are() -> None:
    tokens, states = with_teacher("cached", "top_k", 16), with_teacher("cached", "fp8")
    for before, now in itertools.permutations((with_teacher("zero3", "exact"), tokens, states), 2):
        (problem,) = config_drift(before, now, {})
        form = now["teacher"]["cache_form"]
        assert problem.startswith("teacher.cache_form: the checkpoint has")
        assert problem.endswith(f"the run has {form!r}")
        assert config_drift(before, now, {"teacher.cache_form": form}) == []
    # What a configuration says beside a teacher that runs is not what the run did.
    for form in ("exact", "fp8", "top_k"):
        unread = with_teacher("zero3", form, 16)
        assert config_drift(unread, with_teacher("cached", "exact"), {}) == []
        (problem,) = config_drift(unread, states, {})
        assert problem == "teacher.cache_form: the checkpoint has 'exact', the run has 'fp8'"
        assert config_drift(unread, with_teacher("replicated", form, 64), {}) == []
    assert config_drift(tokens, with_teacher("cached", "top_k", 64), {}) == [
        "teacher.cache_top_k: the checkpoint has 16, the run has 64"
    ]
    assert config_drift(states, with_teacher("cached", "fp8", 16), {}) == []
    off = {"distillation": CONFIG["distillation"] | {"enabled": False}}
    assert config_drift(tokens | off, states | off, {}) == []


def test_a_placement_that_changes_the_form_is_accepted_as_a_change_of_the_form() -> None:
    tokens, now = with_teacher("cached", "top_k"), with_teacher("zero3", "top_k")
    accepted = with_accepted({}, ["teacher.cache_form"], now)
    assert accepted == {"teacher.cache_form": "exact"}
    assert len(config_drift(tokens, now, {})) == 1
    assert config_drift(tokens, now, accepted) == []


def test_an_accepted_key_passes_and_another_does_not() -> None:
    current = changed("training", "learning_rate", value=2e-4)
    current["distillation"]["weights"]["logits"] = 0.5
    for accepted in ({"training.learning_rate": 2e-4}, {"training.learning_rate": ANY}):
        (problem,) = config_drift(CONFIG, current, accepted)
        assert problem.startswith("distillation.weights.logits")


def test_a_key_that_was_accepted_with_one_value_is_not_accepted_with_another() -> None:
    accepted = with_accepted({}, ["training.learning_rate"], changed("training", "learning_rate", value=2e-4))
    assert accepted == {"training.learning_rate": 2e-4}
    assert config_drift(CONFIG, changed("training", "learning_rate", value=2e-4), accepted) == []
    assert len(config_drift(CONFIG, changed("training", "learning_rate", value=3e-4), accepted)) == 1
    # Nor back to what it was, once a checkpoint has the accepted value.
    saved = changed("training", "learning_rate", value=2e-4)
    assert len(config_drift(saved, CONFIG, accepted)) == 1


def test_keys_that_an_earlier_version_accepted_for_ever_get_the_value_of_the_next_time() -> None:
    accepted = with_accepted({"training.seed": ANY}, ["training.learning_rate"], CONFIG)
    assert accepted == {"training.seed": 0, "training.learning_rate": 1e-4}


def test_names_workers_and_data_paths_may_change() -> None:
    current = changed("data", "workers", value=9)
    current["run"]["name"] = "b"
    current["data"]["sources"][0] |= {"file": "/b/x.json", "image_folder": "/b"}
    assert config_drift(CONFIG, current, {}) == []
    current["data"]["sources"][0]["template"] = "plain"
    assert len(config_drift(CONFIG, current, {})) == 1


def test_a_key_that_only_one_side_has_is_a_difference() -> None:
    current = copy.deepcopy(CONFIG)
    del current["training"]["seed"]
    assert config_drift(CONFIG, current, {}) == ["training.seed: the checkpoint has 0, the run has None"]


def test_a_checkpoint_with_keys_of_an_older_version_has_not_drifted() -> None:
    saved = {"distillation": {"rows": "all_text", "positions": "supervised"}, "data": {"sources": []}}
    now = {
        "distillation": {"attention_rows": "all_text", "logit_positions": "supervised"},
        "data": {"sources": []},
    }
    assert config_drift(saved, now, {}) == []
    now["distillation"]["attention_rows"] = "prompt_only"
    assert config_drift(saved, now, {}) == [
        "distillation.attention_rows: the checkpoint has 'all_text', the run has 'prompt_only'"
    ]


def test_a_change_that_was_allowed_under_an_old_name_still_is(tmp_path: Path) -> None:
    RunPaths(tmp_path).allowed_changes.write_text('["distillation.rows", "training.seed"]')
    assert allowed_changes(tmp_path) == {"distillation.attention_rows": ANY, "training.seed": ANY}
    RunPaths(tmp_path).allowed_changes.write_text('{"distillation.rows": "all_text"}')
    assert allowed_changes(tmp_path) == {"distillation.attention_rows": "all_text"}


def manifest(world_size: int, stage: int) -> dict:
    return {"world_size": world_size, "config": {"student": {"zero_stage": stage}}}


def test_a_checkpoint_of_another_size_or_stage_must_be_converted() -> None:
    saved = manifest(world_size=4, stage=2)
    assert not must_convert(saved, 4, 2)
    assert must_convert(saved, 2, 2)
    assert must_convert(saved, 4, 1)


def test_what_deepspeed_cannot_convert_is_said() -> None:
    for stage in range(4):
        assert conversion_problem(manifest(4, stage), 4, stage) is None
    for stage in (1, 2, 3):
        assert conversion_problem(manifest(4, stage), 2, stage) is None
    assert conversion_problem(manifest(4, 1), 2, 2) is conversion_problem(manifest(4, 2), 4, 1) is None
    assert "converts stages 1, 2 and 3 only" in str(conversion_problem(manifest(4, 0), 2, 0))
    for before, now in ((0, 1), (1, 0), (2, 3), (3, 2), (1, 3), (3, 1), (0, 3)):
        for world_size in (2, 4):
            problem = str(conversion_problem(manifest(4, before), world_size, now))
            assert f"the checkpoint has {before}, the run has {now}" in problem
