"""Exact-match accuracy per kind of question, compared with always guessing the most frequent answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ALL_KINDS = "all"


@dataclass(frozen=True)
class KindAccuracy:
    accuracy: float  # share of exact matches
    baseline: float  # share of questions with the most frequent answer
    count: int  # questions


@dataclass(frozen=True)
class Accuracy:
    kinds: dict[str, KindAccuracy]  # most frequent kind first
    overall: KindAccuracy  # its baseline guesses separately for each kind

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(kinds: Sequence[str], expected: Sequence[str], answered: Sequence[str]) -> Accuracy:
    """Compare answers, ignoring surrounding white space. The three sequences have equal lengths."""
    rows = [
        (kind, right.strip(), given.strip())
        for kind, right, given in zip(kinds, expected, answered, strict=True)
    ]
    if not rows:
        raise ValueError("no questions to score")
    by_kind: dict[str, KindAccuracy] = {}
    guessed = 0
    for kind, count in Counter(kind for kind, _, _ in rows).most_common():
        of_kind = [(right, given) for name, right, given in rows if name == kind]
        most_frequent = Counter(right for right, _ in of_kind).most_common(1)[0][1]
        guessed += most_frequent
        matches = sum(right == given for right, given in of_kind)
        by_kind[kind] = KindAccuracy(matches / count, most_frequent / count, count)
    total = sum(right == given for _, right, given in rows)
    return Accuracy(by_kind, KindAccuracy(total / len(rows), guessed / len(rows), len(rows)))
