"""Entries of data files, for the tests."""

from __future__ import annotations

from typing import Any


def entry(question: str = "what?", answer: str = "a red circle", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns, **more}
