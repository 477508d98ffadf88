"""Settings that are valid alone but not together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from alignkd.config.live_sections import LoggingSection
from alignkd.config.schema import (
    DataSection,
    DistillationSection,
    EvaluationSection,
    ModelSection,
    StudentSection,
    TrainingSection,
)
from alignkd.config.section import Section
from alignkd.config.slurm_section import SlurmSection, time_limit_seconds
from alignkd.config.teacher_combinations import cache_problems, teacher_problems, top_k_problems
from alignkd.config.teacher_section import TeacherSection
from alignkd.text import listed


def _weights(distillation: DistillationSection) -> list[str]:
    weights = distillation.weights
    if distillation.enabled and not (weights.attention or weights.vision or weights.logits):
        return [
            "distillation.weights are all 0 although distillation.enabled = true; valid: at least one "
            "positive weight, or `distillation.enabled: false`"
        ]
    return []


def _scratch(model: ModelSection) -> list[str]:
    if model.student != "scratch":
        return []
    return [
        f"model.{key} is missing: model.student = scratch needs it; valid: {valid}"
        for key, value, valid in (
            ("student_config", model.student_config, "a folder with config.json and tokenizer.model"),
            (
                "vision_tower",
                model.vision_tower,
                "a CLIP folder, or a MobileVLM folder to take the tower from",
            ),
        )
        if value is None
    ]


def _attention_rows(
    distillation: DistillationSection, data: DataSection, evaluation: EvaluationSection
) -> list[str]:
    sources = [*data.sources, *(evaluation.sources if evaluation.every is not None else [])]
    plain = [source.file for source in sources if source.template == "plain"]
    if distillation.enabled and distillation.attention_rows == "prompt_only" and plain:
        return [
            "distillation.attention_rows = prompt_only needs a prompt, and the template `plain` has none "
            f"({', '.join(plain)}); valid: distillation.attention_rows = all_text, or the template v1"
        ]
    return []


def _evaluation(
    evaluation: EvaluationSection, distillation: DistillationSection, teacher: TeacherSection
) -> list[str]:
    if evaluation.every is None:
        return []
    problems = []
    by_task = evaluation.best == "accuracy"
    if not evaluation.sources and evaluation.task is None:
        problems.append(
            "evaluation.every needs something to evaluate; valid: evaluation.sources, a list like "
            "data.sources of other samples, or evaluation.task, a task of `alignkd eval`, or both"
        )
    elif by_task and evaluation.task is None:
        problems.append(
            "evaluation.best = accuracy needs evaluation.task; valid: a task, or evaluation.best = loss"
        )
    elif not by_task and not evaluation.sources:
        problems.append(
            f"evaluation.best = {evaluation.best} needs evaluation.sources; valid: held-out data, or "
            "evaluation.best = accuracy"
        )
    if evaluation.task is not None and evaluation.task_data is None:
        problems.append(
            "evaluation.task_data is missing: evaluation.task needs its questions; valid: the folder that "
            "`alignkd eval --data` takes"
        )
    if evaluation.sources and distillation.enabled and teacher.placement == "cached":
        problems.append(
            "evaluation.sources need a teacher that runs, and teacher.placement = cached has its answers to "
            "the training data only; valid: another placement, or evaluation.task alone"
        )
    return problems


def _gradient_norms(logging: LoggingSection, student: StudentSection) -> list[str]:
    if logging.gradient_norms_every is not None and student.zero_stage == 3:
        return [
            "logging.gradient_norms_every does not work with student.zero_stage = 3, which shards them; "
            "valid: stage 0, 1 or 2; `alignkd probe --run` measures a checkpoint of any stage"
        ]
    return []


def _balance(
    distillation: DistillationSection, student: StudentSection, training: TrainingSection
) -> list[str]:
    if not distillation.enabled or distillation.balance != "gradient":
        return []
    problems = []
    if student.zero_stage == 3:
        problems.append(
            "distillation.balance = gradient does not work with student.zero_stage = 3, which shards the "
            "gradients that it measures; valid: stage 0, 1 or 2, or distillation.balance = learned"
        )
    if training.precision == "fp16":
        problems.append(
            "distillation.balance = gradient does not work with training.precision = fp16, in which small "
            "gradients are measured as 0; valid: bf16 or fp32, or distillation.balance = learned"
        )
    return problems


def _batches(training: TrainingSection) -> list[str]:
    whole, micro = training.global_batch_size, training.micro_batch_size
    if whole % micro == 0 or training.tokens_per_micro_batch is not None:
        return []
    return [
        f"training.global_batch_size = {whole} cannot be split into micro-batches of "
        f"training.micro_batch_size = {micro}; valid micro-batch sizes: {listed(divisors(whole))}"
    ]


def _offload(student: StudentSection) -> list[str]:
    if student.offload and student.zero_stage == 0:
        return [
            "student.offload = true requires sharded optimizer states; valid: student.zero_stage 1, 2 or 3"
        ]
    return []


def _trained_parts(student: StudentSection, training: TrainingSection) -> list[str]:
    if student.train == [] and not training.train_vision_tower:
        return [
            "student.train = [] leaves nothing to train; valid: projector, language_model or both, or "
            "training.train_vision_tower = true"
        ]
    return []


def _lora(student: StudentSection, training: TrainingSection) -> list[str]:
    problems = []
    if student.lora is not None and student.train is not None and "language_model" not in student.train:
        problems.append(
            "student.lora adapts the language model, which student.train leaves out; valid: student.train "
            "with language_model, or no student.lora"
        )
    if student.lora is not None and training.compile_layers:
        problems.append("training.compile_layers = true does not work with student.lora; valid: false")
    return problems


def _compiled_layers(
    training: TrainingSection,
    student: StudentSection,
    teacher: TeacherSection,
    distillation: DistillationSection,
) -> list[str]:
    whole_teacher = distillation.enabled and teacher.placement == "replicated"
    if training.compile_layers and student.zero_stage == 3 and not whole_teacher:
        return [
            "training.compile_layers = true compiles no layer that ZeRO-3 shards, and here it shards all; "
            "valid: compile_layers = false, student.zero_stage 0, 1 or 2, teacher.placement = replicated"
        ]
    return []


def _fp16_without_zero(student: StudentSection, training: TrainingSection) -> list[str]:
    if student.zero_stage == 0 and training.precision == "fp16":
        # DeepSpeed 0.19.8 scales the loss for ZeRO optimizers only, but always divides the gradients.
        return ["training.precision = fp16 does not work with student.zero_stage = 0; valid: stage 1, 2 or 3"]
    return []


def _signal_lead(slurm: SlurmSection) -> list[str]:
    if slurm.time_limit is None:
        return []
    seconds = time_limit_seconds(slurm.time_limit)
    if seconds > slurm.signal_seconds:
        return []
    return [
        f"slurm.signal_seconds = {slurm.signal_seconds} is not shorter than slurm.time_limit = "
        f"{slurm.time_limit} ({seconds} s): the run would be told to stop as soon as it starts"
    ]


_CHECKS: list[tuple[Callable[..., list[str]], tuple[str, ...]]] = [
    (teacher_problems, ("distillation", "model")),
    (cache_problems, ("distillation", "teacher")),
    (top_k_problems, ("distillation", "teacher")),
    (_weights, ("distillation",)),
    (_scratch, ("model",)),
    (_attention_rows, ("distillation", "data", "evaluation")),
    (_evaluation, ("evaluation", "distillation", "teacher")),
    (_gradient_norms, ("logging", "student")),
    (_balance, ("distillation", "student", "training")),
    (_batches, ("training",)),
    (_offload, ("student",)),
    (_trained_parts, ("student", "training")),
    (_lora, ("student", "training")),
    (_compiled_layers, ("training", "student", "teacher", "distillation")),
    (_fp16_without_zero, ("student", "training")),
    (_signal_lead, ("slurm",)),
]


def combination_problems(sections: Mapping[str, Section]) -> list[str]:
    """Conflicts between keys. ``sections`` holds the sections that are valid on their own; checks that need
    any other section are skipped."""
    problems = []
    for check, names in _CHECKS:
        if all(name in sections for name in names):
            problems += check(*(sections[name] for name in names))
    return problems


def divisors(number: int) -> list[int]:
    low = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return sorted({*low, *(number // value for value in low)})
