"""Standard errors, and the comparison of two models that answered the same questions.

Questions about one image are not independent, so what counts as drawn at random is the *unit*: an image with
all its questions, or a question where each has an image of its own. Every score is a function of sums over
units. From that one shape follow

- the standard error, by the jackknife: the score without each unit in turn. For a plain mean over units it
  is exactly s / sqrt(n); it also holds for F1, for MME's sums and for units of different sizes, and needs no
  seed;
- the 95 % interval of a difference, by a paired bootstrap: both models on the same units, drawn again and
  again.

Units of different strata (MME's categories) are drawn apart, since the number in each is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ScoreOf = Callable[[Array], Array]  # sums [..., C] -> scores [...]

REPLICATES = 5000
_CHUNK = 250  # replicates at a time: [250, 12,578] weights are 25 MB


@dataclass(frozen=True)
class Estimate:
    value: float
    standard_error: float | None  # None with fewer than two units in a stratum


@dataclass(frozen=True)
class Units:
    names: tuple[str, ...]
    counts: Array  # [U, C], sums over the questions of each unit
    strata: tuple[str, ...]  # of each unit

    @classmethod
    def of(
        cls, rows: Iterable[tuple[str, Sequence[float]]], stratum: Callable[[str], str] | None = None
    ) -> Units:
        """(unit, counts [C]) of every question -> their sums per unit. ``stratum``: name of a unit -> its
        stratum; without it all units are one stratum."""
        sums: dict[str, Array] = {}
        for name, counts in rows:
            sums[name] = sums.get(name, 0.0) + np.asarray(counts, dtype=np.float64)
        names = tuple(sums)
        strata = tuple("" if stratum is None else stratum(name) for name in names)
        return cls(names, np.stack(list(sums.values())), strata)


def ratio(parts: Array, wholes: Array) -> Array:
    """``parts / wholes``, 0 where ``wholes`` is 0: an F1 without any yes, say."""
    return np.divide(parts, wholes, out=np.zeros_like(wholes), where=wholes != 0)


def percent(sums: Array) -> Array:
    """Sums [..., 2] of (score, questions) -> mean score in per cent [...]."""
    return 100.0 * ratio(sums[..., 0], sums[..., 1])


def estimate(units: Units, score_of: ScoreOf) -> Estimate:
    """The score of all units and its standard error, by the jackknife within each stratum."""
    total = units.counts.sum(axis=0)
    value = float(score_of(total))
    variance = 0.0
    for members in _members(units.strata):
        count = len(members)
        if count < 2:
            return Estimate(value, None)
        without = score_of(total - units.counts[members])
        variance += (count - 1) / count * float(np.square(without - without.mean()).sum())
    return Estimate(value, variance**0.5)


@dataclass(frozen=True)
class Difference:
    value: float  # first model minus second
    low: float  # of the 95 % interval
    high: float


def paired_difference(
    first: Units, second: Units, score_of: ScoreOf, *, replicates: int = REPLICATES, seed: int = 0
) -> Difference:
    """Both must hold the same units in the same order (ValueError otherwise)."""
    if first.names != second.names or first.strata != second.strata:
        raise ValueError("the two models answered different questions")
    value = float(score_of(first.counts.sum(axis=0)) - score_of(second.counts.sum(axis=0)))
    random = np.random.default_rng(seed)
    members = _members(first.strata)
    differences = []
    for start in range(0, replicates, _CHUNK):
        weights = _weights(random, members, min(_CHUNK, replicates - start), len(first.names))
        differences.append(score_of(weights @ first.counts) - score_of(weights @ second.counts))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    return Difference(value, float(low), float(high))


@dataclass(frozen=True)
class McNemar:
    only_first: int  # questions that only the first model answers right
    only_second: int
    p_value: float  # exact, two-sided


def mcnemar(first: Mapping[str, bool], second: Mapping[str, bool]) -> McNemar:
    """Exact test on the questions where exactly one of two models is right (ValueError: other questions).

    Takes questions as independent, which those about one image are not quite.
    """
    if first.keys() != second.keys():
        raise ValueError("the two models answered different questions")
    only_first = sum(right and not second[name] for name, right in first.items())
    only_second = sum(second[name] and not right for name, right in first.items())
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail, ways = 0, 1  # whole numbers: exact for thousands of questions
    for number in range(fewer + 1):
        tail += ways
        ways = ways * (count - number) // (number + 1)
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**count))


def _members(strata: Sequence[str]) -> list[npt.NDArray[np.intp]]:
    numbers: dict[str, list[int]] = {}
    for number, stratum in enumerate(strata):
        numbers.setdefault(stratum, []).append(number)
    return [np.array(found, dtype=np.intp) for found in numbers.values()]


def _weights(
    random: np.random.Generator, members: Sequence[npt.NDArray[np.intp]], replicates: int, units: int
) -> Array:
    """How often each unit is drawn, [replicates, units]."""
    weights = np.zeros((replicates, units))
    for stratum in members:
        count = len(stratum)
        drawn = random.integers(count, size=(replicates, count)) + count * np.arange(replicates)[:, None]
        times = np.bincount(drawn.ravel(), minlength=replicates * count)
        weights[:, stratum] = times.reshape(replicates, count)
    return weights
