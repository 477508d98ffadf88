import json
import re

import pytest

from alignkd.config.schema import TrainingSection
from alignkd.errors import UserError
from launcher.render import deepspeed as render
from launcher.render.deepspeed_keys import KNOWN, check_keys
from launcher.render.resources import resource_folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batch_sizes_are_written_as_numbers(make_config, ranks: int) -> None:
    values = render.student_config(make_config(), ranks)
    assert values["train_batch_size"] == 8
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 8 // (2 * ranks)


def test_the_batch_split_is_shown_in_words() -> None:
    training = TrainingSection(global_batch_size=24, micro_batch_size=4)
    assert render.batch_split(training, 3) == "global batch 24 = micro-batch 4 x 3 ranks x 2 times"
    training = TrainingSection(global_batch_size=24, micro_batch_size=4, tokens_per_micro_batch=4096)
    text = "global batch 24 over 5 ranks, in micro-batches of at most 4096 tokens"
    assert render.batch_split(training, 5) == text


def test_with_a_token_budget_the_micro_batch_size_need_not_divide(make_config) -> None:
    config = make_config("training.tokens_per_micro_batch=4096", "training.micro_batch_size=3")
    values = render.student_config(config, 5)  # DeepSpeed wants these to fit each other
    assert values["gradient_accumulation_steps"] == 1
    assert values["train_batch_size"] == values["train_micro_batch_size_per_gpu"] * 5 == 15
    with pytest.raises(UserError, match="leaves some of 9 ranks without a sample; valid: at least 9"):
        render.accumulation_steps(config.training, 9)


def test_an_impossible_split_lists_those_that_work() -> None:
    training = TrainingSection(global_batch_size=24, micro_batch_size=4)
    assert render.accumulation_steps(training, 3) == 2
    with pytest.raises(UserError) as caught:
        render.accumulation_steps(training, 4)
    assert "micro-batch sizes that fit 4 ranks: 1, 2, 3, 6;" in str(caught.value)
    assert str(caught.value).endswith("rank counts that fit this micro-batch size: 1, 2, 3, 6")
    with pytest.raises(
        UserError, match="no micro-batch size fits 5 ranks; nearest global batch sizes: 20, 40"
    ):
        render.accumulation_steps(training, 5)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (stage, precision, offload)
        for stage in (0, 1, 2, 3)
        for precision in ("bf16", "fp16", "fp32")
        for offload in (False, True)
        if stage > 0 or (precision != "fp16" and not offload)  # refused by the configuration
    ],
)
def test_every_student_file_is_nested_complete_and_without_auto(
    make_config, stage, precision, offload
) -> None:
    config = make_config(
        f"student.zero_stage={stage}",
        f"training.precision={precision}",
        f"student.offload={str(offload).lower()}",
        "training.max_gradient_norm=0",
    )
    values = render.student_config(config, 2, device="cpu")
    text = json.dumps(values)
    assert "auto" not in text
    assert not re.search(r'"[^"]*\.[^"]*":', text), "dotted keys are ignored by DeepSpeed"
    assert values["zero_optimization"]["stage"] == stage
    assert {"bf16", "fp16"} & values.keys() == ({precision} - {"fp32"})
    assert values["gradient_clipping"] == 0
    assert values["zero_force_ds_cpu_optimizer"] is False
    assert values["zero_allow_untested_optimizer"] is True
    assert not {"optimizer", "scheduler"} & values.keys()
    offloaded = {"offload_optimizer", "offload_param"} & values["zero_optimization"].keys()
    expected = {"offload_optimizer", *(["offload_param"] if stage == 3 else [])} if offload else set()
    assert offloaded == expected
    assert all(not values["zero_optimization"][key]["pin_memory"] for key in offloaded)
    on_gpus = render.student_config(config, 2)["zero_optimization"]
    buckets = [zero.get("reduce_bucket_size") for zero in (values["zero_optimization"], on_gpus)]
    assert (buckets[0] != buckets[1]) == (stage in (1, 2))
    assert stage not in (1, 2) or buckets == [4_000_000, 200_000_000]


def test_only_a_sharded_teacher_has_a_file(make_config) -> None:
    values = render.teacher_config(make_config("teacher.precision=bf16"))
    assert values["zero_optimization"]["stage"] == 3
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["bf16"] == {"enabled": True}
    assert "optimizer" not in values
    assert render.teacher_config(make_config("teacher.placement=replicated")) is None
    in_host = render.teacher_config(make_config("teacher.placement=zero3_offload"), device="cpu")
    assert in_host["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert (
        "offload_param"
        not in render.teacher_config(make_config("teacher.placement=zero3_node"))["zero_optimization"]
    )
    assert render.teacher_config(make_config("distillation.enabled=false")) is None


def test_base_files_edited_by_hand_are_checked(make_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(render, "resource_folder", lambda name: tmp_path)
    base = tmp_path / "student_stage2.json"
    for text, message in [
        ("{", "not readable as JSON"),
        ("[]", "one JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "stage must be 2"),
        ('{"a": 1, "a": 2}', "duplicate key"),
        ('{"zero_optimization.stage": 2}', "zero_optimization.stage: unknown key"),
    ]:
        base.write_text(text)
        with pytest.raises(UserError, match=message):
            render.student_config(make_config(), 1)
    base.write_text('{"fp16": {"initial_scale_power": 8}, "zero_optimization": {"stage": 2}}')
    assert "fp16" not in render.student_config(make_config(), 1)
    values = render.student_config(make_config("training.precision=fp16"), 1)
    assert values["fp16"] == {"initial_scale_power": 8, "enabled": True}


def test_all_bad_keys_are_listed_with_a_reason() -> None:
    with pytest.raises(UserError) as caught:
        check_keys(
            {
                "train_batchsize": 1,
                "zero_optimization": {"stage": True, "stage3_prefetch_bucket_size": "auto", "hpz": 1},
                "bf16": True,
                "optimizer": {},
                "checkpoint": {"writer": {}},
                "gradient_clipping": 1,
            },
            "x.json",
        )
    text = str(caught.value)
    for part in [
        "train_batchsize: unknown key",
        "zero_optimization.stage = True: must be of type int",
        "stage3_prefetch_bucket_size = auto",
        "zero_optimization.hpz: unknown key",
        "bf16 = True: must be a section",
        "optimizer: unknown key; the engine builds",
        "checkpoint: unknown key; checkpoints are written by alignkd",
    ]:
        assert part in text
    assert "gradient_clipping" not in text.replace("valid here: " + ", ".join(KNOWN), "")


def test_known_keys_exist_in_the_installed_deepspeed() -> None:
    """DeepSpeed ignores unknown keys, so a renamed one would be lost silently."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import get_timers_config

    def names(model) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    assert KNOWN["zero_optimization"].keys() <= names(DeepSpeedZeroConfig)
    assert KNOWN["bf16"].keys() <= names(DeepSpeedBF16Config)
    assert KNOWN["fp16"].keys() <= names(DeepSpeedFP16Config)
    assert KNOWN["zero_optimization"]["offload_optimizer"].keys() <= names(
        DeepSpeedZeroOffloadOptimizerConfig
    )
    assert KNOWN["zero_optimization"]["offload_param"].keys() <= names(DeepSpeedZeroOffloadParamConfig)
    top = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    assert KNOWN.keys() - {"zero_optimization", "timers"} <= top
    timers = get_timers_config({"timers": {"throughput": {"enabled": False}}})
    assert not timers.enabled
    assert KNOWN["timers"]["throughput"].keys() <= names(type(timers))
    assert DeepSpeedConfig is not None


@pytest.mark.parametrize("path", sorted(resource_folder("ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_base_files_hold_known_keys_only(path) -> None:
    check_keys(json.loads(path.read_text()), path.name)
