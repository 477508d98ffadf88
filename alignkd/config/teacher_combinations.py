"""Settings of the teacher that are valid alone but not together."""

from __future__ import annotations

from alignkd.config.schema import DistillationSection, ModelSection
from alignkd.config.teacher_section import TeacherSection


def teacher_problems(distillation: DistillationSection, model: ModelSection) -> list[str]:
    if distillation.enabled and model.teacher is None:
        return [
            "model.teacher is missing: distillation.enabled = true needs it; valid: the teacher's folder, "
            "or `distillation.enabled: false` to train on the labels only"
        ]
    return []


def cache_problems(distillation: DistillationSection, teacher: TeacherSection) -> list[str]:
    if distillation.enabled and teacher.placement == "cached" and teacher.cache is None:
        return [
            "teacher.cache is missing: teacher.placement = cached needs it; valid: what `alignkd cache` wrote"
        ]
    return []


def top_k_problems(distillation: DistillationSection, teacher: TeacherSection) -> list[str]:
    """Of a run that reads such a cache; with other placements the form has no effect."""
    return divergence_problems(distillation, teacher) if teacher.caches_top_k else []


def divergence_problems(distillation: DistillationSection, teacher: TeacherSection) -> list[str]:
    """Of a cache in this form, wherever the teacher is: `alignkd cache` writes none that no run can read."""
    divergence = distillation.divergence
    if not distillation.enabled or teacher.cache_form != "top_k" or divergence == "forward_kl":
        return []
    return [
        f"teacher.cache_form = top_k does not work with distillation.divergence = {divergence}, which "
        "also depends on the student's probabilities of the tokens that such a cache lacks, and would come "
        "out too small; valid: distillation.divergence = forward_kl, or teacher.cache_form = exact or fp8"
    ]
