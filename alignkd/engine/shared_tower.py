"""May the student use the teacher's vision features? Only where its own tower would make the same ones."""

from __future__ import annotations

from alignkd.engine.ranks import Ranks
from alignkd.models.loading import tower_fingerprint
from alignkd.models.mobilevlm import MobileVLM


def reason_for_own_tower(teacher: MobileVLM, student: MobileVLM, ranks: Ranks) -> str | None:
    """Why both towers must run; None when one serves both. The same on all ranks. Collective.

    Preprocessing is the same for teacher and student, or the run does not start (``models.agreement``).
    """
    if student.train_vision_tower:
        return "the student's is trained"
    if teacher.config.tower_config != student.config.tower_config:
        return "their configurations differ"
    if teacher.used_tower_layers != student.used_tower_layers:
        return "mm_vision_select_layer differs"
    dtypes = [next(model.vision_tower.parameters()).dtype for model in (teacher, student)]
    if dtypes[0] != dtypes[1]:
        return f"their precisions differ: {dtypes[0]} and {dtypes[1]}"
    hashes = [tower_fingerprint(model, hashing=ranks.is_first) for model in (teacher, student)]
    differ: bool = ranks.broadcast_object(hashes[0] != hashes[1])
    return "their weights differ" if differ else None
