"""JSON files of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, raise_if_passing


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises CheckpointError when the file is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model folder needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise_if_passing(error, path)
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value
