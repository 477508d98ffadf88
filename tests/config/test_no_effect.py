"""Settings without effect are named."""

from __future__ import annotations

import pytest

from alignkd.config import load_config, warnings_of

from .conftest import BASE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.enabled=false"], "model.teacher is not used"),
        (["training.tokens_per_micro_batch=100"], "micro-batch of its own"),
        (
            ["training.gradient_checkpointing=false", "training.checkpoint_every_nth_layer=2"],
            "training.checkpoint_every_nth_layer has no effect",
        ),
        (["distillation.enabled=false", "distillation.top_k=3"], "distillation.top_k has no effect"),
        (["distillation.enabled=false", "teacher.placement=replicated"], "teacher.placement has no effect"),
        (["teacher.cache_top_k=16"], "teacher.cache_top_k has no effect: only teacher.cache_form = top_k"),
        (["teacher.placement=replicated", "teacher.keep_head=false"], "teacher.keep_head has no effect"),
        (["teacher.cache_form=fp8"], "teacher.cache_form has no effect"),
        (
            ["distillation.enabled=false", "training.adapter_learning_rate=1e-3"],
            "adapter_learning_rate has no effect",
        ),
        (["distillation.weights.logits=0", "distillation.temperature=2"], "distillation.temperature has no"),
        (
            ["distillation.weights.vision=0", "distillation.vision_focus_weight=1"],
            "vision_focus_weight has no",
        ),
        (["distillation.vision_focus_weight=0", "distillation.top_k=3"], "top_k has no effect"),
        (
            ["distillation.enabled=false", "distillation.balance=learned"],
            "distillation.balance has no effect",
        ),
        (["distillation.balance=learned", "distillation.balance_every=7"], "only distillation.balance = g"),
        (
            ["distillation.balance=gradient", "training.max_steps=99", "checkpoint.every=9"],
            "distillation.balance_every = 100 is more than training.max_steps = 99",
        ),
        (["model.student_config=c"], "model.student_config has no effect"),
        (["training.max_steps=10"], "no checkpoint is saved before the end"),
        (["model.student=x", "model.teacher=x"], "same folder"),
        (["evaluation.sources=[{file: b.json}]"], "evaluation.sources has no effect"),
        (["evaluation={task: sample, task_data: d}"], "evaluation.task has no effect: evaluation.every"),
        (
            ["evaluation={task: sample, task_data: d, questions: 3}"],
            "evaluation.questions has no effect: evaluation.every",
        ),
        (
            ["evaluation={sources: [{file: b.json}], samples: 3}"],
            "evaluation.samples has no effect: evaluation.every",
        ),
        (
            ["evaluation={task: sample, task_data: d, best: accuracy}"],
            "evaluation.best has no effect: evaluation.every",
        ),
        (
            ["evaluation={every: 1, task: sample, task_data: d, best: accuracy, samples: 3}"],
            "evaluation.samples has no effect: evaluation.sources is empty",
        ),
        (
            ["evaluation={every: 1, sources: [{file: b.json}], questions: 3}"],
            "evaluation.questions has no effect: evaluation.task is null",
        ),
        (
            ["data.sources=[{file: b.json}]", "evaluation={every: 1, sources: [{file: b.json}]}"],
            "b.json is in data.sources too",
        ),
    ],
)
def test_settings_without_effect_warn(write, overrides: list[str], message: str) -> None:
    assert any(message in warning for warning in warnings_of(load_config(write(BASE), overrides)))


def test_defaults_give_no_warning(write) -> None:
    assert warnings_of(load_config(write(BASE))) == []
    gradient = ["distillation.balance=gradient", "distillation.balance_every=7"]
    assert warnings_of(load_config(write(BASE), gradient)) == []


def test_what_a_top_k_cache_was_written_for_has_an_effect(write) -> None:
    run = ["teacher.placement=cached", "teacher.cache=/c", "teacher.cache_form=top_k"]
    logits = [
        "distillation.divergence=forward_kl",
        "distillation.temperature=2",
        "distillation.weights.logits=0",
    ]
    assert warnings_of(load_config(write(BASE), [*run, *logits])) == []


@pytest.mark.parametrize(
    ("stage", "text"), [(0, "accumulates gradients in bf16"), (1, "accumulates gradients in bf16"), (2, None)]
)
def test_accumulating_gradients_in_half_precision_warns(write, stage: int, text: str | None) -> None:
    warnings = [
        w for w in warnings_of(load_config(write(BASE), [f"student.zero_stage={stage}"])) if "bf16" in w
    ]
    assert len(warnings) == (text is not None)
    assert text is None or text in warnings[0]
