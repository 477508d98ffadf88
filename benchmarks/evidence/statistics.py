"""Means, standard errors and paired differences of records.

Every kind of question weighs the same: a run's accuracy is the mean over kinds. Two conditions are compared
on the seeds that both have, with the same initial student, data order and questions. The 95 % interval of
the difference is a bootstrap over seeds and questions: both are drawn again, questions within their kind.
With few seeds it is too narrow, which is why the number of pairs stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Record = Mapping[str, Any]
REPLICATES = 5000


@dataclass(frozen=True)
class Mean:
    value: float
    standard_error: float | None  # over seeds; None with fewer than two
    seeds: int


@dataclass(frozen=True)
class Paired:
    value: float  # condition minus baseline
    low: float  # of the 95 % interval
    high: float
    seeds: int


def accuracy(record: Record, kind: str | None = None) -> float:
    """On the test, of one kind or the mean over all."""
    kinds = record["test"] if kind is None else {kind: record["test"][kind]}
    return statistics.fmean(statistics.fmean(map(int, flags)) for flags in kinds.values())


def mean_accuracy(records: Sequence[Record], kind: str | None = None) -> Mean:
    values = [accuracy(record, kind) for record in records]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Mean(statistics.fmean(values), error, len(values))


def paired_difference(
    condition: Sequence[Record], baseline: Sequence[Record], kind: str | None = None, seed: int = 0
) -> Paired | None:
    """None without a common seed."""
    first, second = ({record["seed"]: record for record in one} for one in (condition, baseline))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    kinds = list(first[seeds[0]]["test"]) if kind is None else [kind]
    differences = [
        np.stack([_flags(first[one], name) - _flags(second[one], name) for one in seeds]) for name in kinds
    ]
    seed_weights, *of_questions = _shares(seed, len(seeds), *(one.shape[1] for one in differences))
    drawn: Array = np.zeros(REPLICATES)
    for difference_SQ, question_weights in zip(differences, of_questions, strict=True):
        drawn += ((seed_weights @ difference_SQ) * question_weights).sum(axis=1) / len(differences)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = statistics.fmean(float(one.mean()) for one in differences)
    return Paired(value, float(low), float(high), len(seeds))


def validation_accuracy(look: Mapping[str, Any]) -> float:
    return statistics.fmean(look["accuracy"].values())


def steps_to_reach(record: Record, baseline: Record) -> int | None:
    """Steps after which a run first validates as well as the baseline does at its end; None if it never
    does."""
    wanted = validation_accuracy(baseline["validation"][-1])
    reached = (look["step"] for look in record["validation"] if validation_accuracy(look) >= wanted)
    return next(reached, None)


def gradient_shares(records: Sequence[Record]) -> dict[str, dict[str, tuple[float, float]]]:
    """part -> term -> (lowest, highest) ratio of its gradient norm to that of the cross-entropy, over steps
    and runs. Parts that the cross-entropy does not reach are left out."""
    found: dict[str, dict[str, list[float]]] = {}
    for look in (look for record in records for look in record["gradient_norms"]):
        base = look["norms"].get("ce", {})
        for term, parts in look["norms"].items():
            for part, norm in parts.items():
                if term != "ce" and norm > 0 and base.get(part, 0) > 0:
                    found.setdefault(part, {}).setdefault(term, []).append(norm / base[part])
    return {
        part: {term: (min(ratios), max(ratios)) for term, ratios in terms.items()}
        for part, terms in found.items()
    }


def _flags(record: Record, kind: str) -> Array:
    return np.array([int(flag) for flag in record["test"][kind]], dtype=np.float64)


@lru_cache(maxsize=8)  # the same draws for hundreds of differences, and slower than all else
def _shares(seed: int, *counts: int) -> tuple[Array, ...]:
    """How often each of so many is drawn, as a share, [REPLICATES, count] each, to be read only."""
    random = np.random.default_rng(seed)
    return tuple(random.multinomial(one, np.full(one, 1 / one), size=REPLICATES) / one for one in counts)
