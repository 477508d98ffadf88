"""Whether one vision tower can serve both models: only if both towers would compute the same features."""

from __future__ import annotations

from alignkd.distributed.ranks import Ranks
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.families.mobilevlm_loading import tower_fingerprint


def reason_for_own_tower(
    teacher: VisionLanguageModel, student: VisionLanguageModel, ranks: Ranks
) -> str | None:
    """Why both towers must run, or None when one serves both; the same answer on all ranks. Collective.

    Preprocessing is not compared: a run whose models differ there does not start (``models.agreement``).
    """
    if not isinstance(teacher, MobileVLM) or not isinstance(student, MobileVLM):
        return "only MobileVLMs share one"
    if student.train_vision_tower:
        return "the student's tower is trained"
    if teacher.config.tower_config != student.config.tower_config:
        return "their configurations differ"
    if teacher.used_tower_layers != student.used_tower_layers:
        return "they select different layers (mm_vision_select_layer)"
    dtypes = [next(model.vision_tower.parameters()).dtype for model in (teacher, student)]
    if dtypes[0] != dtypes[1]:
        return f"their precisions differ: {dtypes[0]} and {dtypes[1]}"
    hashes = [tower_fingerprint(model, hashing=ranks.is_first) for model in (teacher, student)]
    differ: bool = ranks.broadcast_object(hashes[0] != hashes[1])
    return "their weights differ" if differ else None
