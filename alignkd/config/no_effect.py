"""Settings of a valid configuration that have no effect, or almost certainly not the intended one."""

from __future__ import annotations

from alignkd.config.schema import Config, EvaluationSection
from alignkd.config.section import Section


def warnings_of(config: Config) -> list[str]:
    """One sentence each."""
    distillation, model = config.distillation, config.model
    found = []
    if not distillation.enabled:
        if model.teacher is not None:
            found.append("model.teacher is not used: distillation.enabled = false")
        if model.adapters is not None:
            found.append("model.adapters is not used: distillation.enabled = false")
        changed = [f"distillation.{name}" for name in _changed(distillation) if name != "enabled"]
        changed += [f"teacher.{name}" for name in _changed(config.teacher)]
        found += [f"{name} has no effect: distillation.enabled = false" for name in changed]
        if config.training.adapter_learning_rate is not None:
            found.append("training.adapter_learning_rate has no effect: distillation.enabled = false")
    else:
        found += _weight_warnings(config)
        if config.teacher.cache is not None and config.teacher.placement != "cached":
            found.append("teacher.cache has no effect: only teacher.placement = cached reads it")
        if config.teacher.cache_form != "exact" and config.teacher.placement != "cached":
            found.append("teacher.cache_form has no effect: only teacher.placement = cached reads a cache")
        if "cache_top_k" in _changed(config.teacher) and not config.teacher.caches_top_k:
            found.append(
                "teacher.cache_top_k has no effect: only teacher.cache_form = top_k with "
                "teacher.placement = cached reads it"
            )
        if not config.teacher.keep_head and config.teacher.placement in ("replicated", "cached"):
            found.append("teacher.keep_head has no effect: the teacher is not sharded")
    if model.student != "scratch" and model.student_config is not None:
        found.append("model.student_config has no effect: only model.student = scratch reads it")
    if config.training.max_steps is not None and config.checkpoint.every > config.training.max_steps:
        found.append(
            f"checkpoint.every = {config.checkpoint.every} is more than training.max_steps = "
            f"{config.training.max_steps}: no checkpoint is saved before the end of training"
        )
    found += _evaluation_warnings(config.evaluation)
    trained_on = {source.file for source in config.data.sources}
    found += [
        f"evaluation.sources: {source.file} is in data.sources too, so it is not held out"
        for source in config.evaluation.sources
        if source.file in trained_on
    ]
    training = config.training
    if training.checkpoint_every_nth_layer > 1 and not training.gradient_checkpointing:
        found.append(
            "training.checkpoint_every_nth_layer has no effect: training.gradient_checkpointing = false"
        )
    tokens, longest = training.tokens_per_micro_batch, config.data.max_length
    if tokens is not None and tokens < longest:
        found.append(
            f"training.tokens_per_micro_batch = {tokens} is less than data.max_length = {longest}: a sample "
            "longer than the budget still gets a micro-batch of its own"
        )
    if config.student.zero_stage == 0 and training.precision == "bf16":
        found.append(
            "student.zero_stage = 0 with bf16 accumulates gradients in bf16 "
            "and keeps all fp32 states on every "
            "rank; stage 2 avoids both"
        )
    if config.student.zero_stage == 1 and training.precision != "fp32":
        found.append(
            f"student.zero_stage = 1 accumulates gradients in {training.precision}, stages 2 and 3 in fp32"
        )
    for source in config.data.sources:
        if source.template == "plain" and source.image_folder is None:
            found.append(f"data.sources: {source.file} uses the template `plain` but has no image_folder")
    return found


def _evaluation_warnings(evaluation: EvaluationSection) -> list[str]:
    changed = _changed(evaluation)
    names = ("sources", "samples", "task", "task_data", "questions", "best")
    reasons = dict.fromkeys(names, "evaluation.every is null")
    if evaluation.every is not None:
        reasons = {}
        if not evaluation.sources:
            reasons["samples"] = "evaluation.sources is empty"
        if evaluation.task is None:
            reasons |= dict.fromkeys(("task_data", "questions"), "evaluation.task is null")
    return [
        f"evaluation.{name} has no effect: {reason}" for name, reason in reasons.items() if name in changed
    ]


def _weight_warnings(config: Config) -> list[str]:
    distillation, weights = config.distillation, config.distillation.weights
    found = _balance_warnings(config)
    if weights.logits == 0:
        logit_keys = {"temperature", "divergence", "logit_positions"}
        if config.teacher.caches_top_k:  # the cache was written for them
            logit_keys = set()
        found += [
            f"distillation.{name} has no effect: distillation.weights.logits = 0"
            for name in _changed(distillation)
            if name in logit_keys
        ]
    if weights.attention == 0 and "attention_rows" in _changed(distillation) and weights.vision == 0:
        found.append("distillation.attention_rows has no effect: distillation.weights.attention = 0")
    if weights.vision == 0:
        found += [
            f"distillation.{name} has no effect: distillation.weights.vision = 0"
            for name in _changed(distillation)
            if name in ("vision_focus_weight", "top_k")
        ]
    elif distillation.vision_focus_weight == 0 and "top_k" in _changed(distillation):
        found.append("distillation.top_k has no effect: distillation.vision_focus_weight = 0")
    if weights.attention == 0 and weights.vision == 0 and config.training.adapter_learning_rate is not None:
        found.append("training.adapter_learning_rate has no effect: all terms with an adapter have weight 0")
    if config.model.teacher == config.model.student:
        found.append("model.teacher and model.student are the same folder: there is nothing to distil")
    return found


def _balance_warnings(config: Config) -> list[str]:
    distillation, steps = config.distillation, config.training.max_steps
    if distillation.balance != "gradient":
        changed = "balance_every" in _changed(distillation)
        return (
            ["distillation.balance_every has no effect: only distillation.balance = gradient measures"]
            if changed
            else []
        )
    if steps is not None and distillation.balance_every > steps:
        return [
            f"distillation.balance = gradient has no effect: distillation.balance_every = "
            f"{distillation.balance_every} is more than training.max_steps = {steps}"
        ]
    return []


def _changed(section: Section) -> list[str]:
    """Keys that differ from their default: a saved configuration sets them all."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) != field.get_default(call_default_factory=True)
    ]
