"""The records: one small JSON file for each finished run, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


def path_of(folder: Path, condition: str, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in condition).replace("--", "-")
    return folder / f"{name}.{seed}.json"


def is_finished(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the record exists. Raises ValueError when it was made with other settings: mixing them would
    compare what is not comparable."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in wanted.items() if found.get(key) != value]
    if other:
        raise ValueError(f"{path} was made with another {', '.join(other)}; move it away")
    return True


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(_text(record), encoding="utf-8")
    partial.rename(path)


def read_all(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _text(record: dict[str, Any]) -> str:
    """A line for each key and for each entry of its lists: differences stay readable."""
    lines = []
    for key, value in record.items():
        shown = json.dumps(value)
        if isinstance(value, list) and value:
            shown = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
