"""Questions about the fixture's pictures, and an evaluation of the fixture's student on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkd.evaluate.options import EvalOptions, ModelChoice, OwnQuestions
from tests import tiny

QUESTIONS: Sequence[tuple[str | None, str]] = (
    ("image_0.png", "What is this?"),
    ("image_0.png", "Which colour does it have, and which one would you have chosen in its place?"),
    ("image_1.png", "Which colour?"),
    (None, "Say something."),
    ("image_1.png", "What?"),
)


def write_questions(path: Path, answers: Sequence[str]) -> Path:
    records = []
    for number, ((image, text), answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        value = f"<image>\n{text}" if image else text
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        record = {"id": number, "kind": "seen" if image else "blind", "conversations": turns}
        records.append({**record, "image": image} if image else record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def options(data: Path, out: Path, **changes: Any) -> EvalOptions:
    """The fixture's student on ``data/own.json``."""
    own = OwnQuestions("own.json", str(tiny.FOLDER))
    values: dict[str, Any] = {"own": own, "batch_size": 2, "precision": "fp32"} | changes
    models = values.pop("models", (ModelChoice("student", str(tiny.STUDENT)),))
    return EvalOptions(models, "own", str(data), str(out), **values)
