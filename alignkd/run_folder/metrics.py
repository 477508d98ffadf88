"""The rows of a run's ``metrics.jsonl``. A killed writer may have torn the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkd.run_folder.paths import RunPaths


def whole_rows(run: Path) -> list[dict[str, Any]]:
    """In the order of the file, without lines that are no JSON object; none when it cannot be read."""
    try:
        lines = RunPaths(run).metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
