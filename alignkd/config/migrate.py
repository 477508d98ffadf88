"""Keys that older versions wrote into run folders and checkpoints, so that old runs still resume.

A user's own file gets an error that names the new key instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "distillation.rows": "distillation.attention_rows",
    "distillation.positions": "distillation.logit_positions",
}
REMOVED = ("distillation.fused_head", "distillation.fused_attention")


def migrate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, in today's keys, of a run's ``config.yaml`` or of the ``config`` in a checkpoint's manifest."""
    migrated = copy.deepcopy(dict(config))
    for key in (*RENAMED, *REMOVED):
        section_name, name = key.split(".")
        section = migrated.get(section_name)
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        if key in RENAMED:
            section.setdefault(RENAMED[key].split(".")[1], value)
    return migrated
