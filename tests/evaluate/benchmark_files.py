"""Small files in the public formats of benchmarks and of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignkd.evaluate.answers import AnswerFile, read_answers


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(folder: Path, rows: Iterable[tuple[Any, str, str]], **more: Any) -> AnswerFile:
    """(question_id, prompt, text) of each answer."""
    path = write_lines(
        folder / "answers.jsonl",
        [
            {
                "question_id": question_id,
                "prompt": prompt,
                "text": text,
                "answer_id": "x",
                "model_id": "m",
                "metadata": {},
            }
            | more
            for question_id, prompt, text in rows
        ],
    )
    return read_answers(path)
