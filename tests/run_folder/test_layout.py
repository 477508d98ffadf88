from __future__ import annotations

from typing import Any

import pytest

from alignkd.run_folder.layout import layout_facts, layout_problems, version_changes

DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100},
}
GROUPS = [[["a", [2, 3]], ["b", [4]]], [["c", [5]]]]


def changed(key: str, value: Any) -> dict[str, Any]:
    facts = layout_facts(DEEPSPEED, GROUPS)
    return {**facts, "deepspeed": {**facts["deepspeed"], key: value}}


def problems(current: dict[str, Any], *, converts: bool = False) -> tuple[list[str], list[str]]:
    return layout_problems({"layout": layout_facts(DEEPSPEED, GROUPS)}, current, converts=converts)


def test_the_same_layout_has_no_problem_and_an_old_manifest_is_believed() -> None:
    assert problems(layout_facts(DEEPSPEED, GROUPS)) == ([], [])
    assert layout_problems({}, layout_facts(DEEPSPEED, GROUPS), converts=False) == ([], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.sub_group_size", 10),
        ("zero_optimization.offload_optimizer.device", "cpu"),
        ("data_types.grad_accum_dtype", "fp32"),
        ("bf16.enabled", False),
        ("fp16.enabled", True),
        ("a_key_of_the_future", 1),
    ],
)
def test_a_key_that_may_decide_the_layout_is_refused(key: str, value: Any) -> None:
    (problem,), harmless = problems(changed(key, value))
    before = layout_facts(DEEPSPEED, GROUPS)["deepspeed"].get(key)
    assert problem == f"ds/student.json: {key}: the checkpoint has {before!r}, the run has {value!r}"
    assert harmless == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_clipping", 2.0),
        ("zero_optimization.reduce_bucket_size", 50),
        ("zero_optimization.overlap_comm", True),
        ("zero_optimization.stage3_prefetch_bucket_size", 1),
        ("zero_optimization.offload_optimizer.pin_memory", True),
        ("fp16.loss_scale_window", 100),
    ],
)
def test_a_key_that_does_not_is_only_named(key: str, value: Any) -> None:
    found, (line,) = problems(changed(key, value))
    assert found == []
    assert f"{key}: the checkpoint has" in line


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_accumulation_steps"])
def test_what_follows_the_number_of_ranks_is_not_named(key: str) -> None:
    assert problems(changed(key, 4)) == ([], [])


def test_a_default_that_was_written_out_is_no_change() -> None:
    assert problems(changed("zero_optimization.round_robin_gradients", False)) == ([], [])


def test_a_conversion_may_change_the_layout_but_not_with_round_robin_gradients() -> None:
    assert problems(changed("zero_optimization.sub_group_size", 10), converts=True) == ([], [])
    (problem,), _ = problems(changed("zero_optimization.round_robin_gradients", True), converts=True)
    assert "DeepSpeed cannot convert" in problem


@pytest.mark.parametrize("converts", [True, False])
@pytest.mark.parametrize(
    ("groups", "named"),
    [
        (
            [[["b", [4]], ["a", [2, 3]]], [["c", [5]]]],
            "parameter 0 of optimizer group 0: the checkpoint has a [2, 3]",
        ),
        ([[["a", [2, 3]], ["b", [4]]], [["c", [6]]]], "the run has c [6]"),
        ([[["a", [2, 3]]], [["c", [5]]]], "optimizer group 0: the checkpoint has 2 parameters, the run 1"),
        ([[["a", [2, 3]], ["b", [4]]]], "the checkpoint has 2 optimizer groups, the run has 1"),
    ],
)
def test_other_parameter_groups_are_refused(groups: list[Any], named: str, converts: bool) -> None:
    (problem,), _ = problems(layout_facts(DEEPSPEED, groups), converts=converts)
    assert named in problem


def test_only_other_versions_of_what_reads_a_checkpoint_are_named() -> None:
    now = {"torch": "2.13", "deepspeed": "0.19.8", "transformers": "5.23"}
    assert version_changes({}, now) == []
    assert version_changes({"versions": now}, now) == []
    changes = version_changes({"versions": {**now, "deepspeed": "0.18", "transformers": "5.0"}}, now)
    assert changes == ["deepspeed: the checkpoint was written with 0.18, this is 0.19.8"]
