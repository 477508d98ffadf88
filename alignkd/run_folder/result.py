"""``result.json``: how training ended. Rank 0 writes it last of all: "done" says that the student is there.

| key | holds |
|---|---|
| status | "done", or "stopped" (saved after a signal) |
| step, total_steps | optimizer steps |
| saves | totals of this process: committed, failed, held_seconds, write_seconds, bytes of the last one |
| peak_memory_bytes_per_rank | a list, by rank |
| seconds | of this process, from the first step on |
| first, last | rows of ``metrics.jsonl`` |

Before each attempt the launcher removes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths


def write_result(run: Path, result: dict[str, Any]) -> None:
    """``result`` has all keys but ``first`` and ``last``. Raises OSError."""
    rows = list(iter_rows(RunPaths(run).metrics))
    ends = {"first": rows[0] if rows else None, "last": rows[-1] if rows else None}
    write_json(RunPaths(run).result, {**result, **ends})


def result_status(run: Path) -> str | None:
    """None while there is no result."""
    status = (read_json(RunPaths(run).result) or {}).get("status")
    return status if isinstance(status, str) else None
