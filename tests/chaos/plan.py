"""Which processes are killed next, and when; and what else happens to a run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.rank import CLOCK, LATE_WRITER
from tests.checkpoint.faulty_storage import PHASES, VICTIMS

ON_EVERY_RANK = ("snapshot", "between", "shards", "flush")
START, TRAINING = "start", "training"
MARKERS, UNMOUNTED, CONVERSION, DISK = "markers removed", "folder not mounted", "conversion", "full disk"
BETWEEN_STARTS = (MARKERS, UNMOUNTED, CONVERSION)
ACCIDENTS = (*BETWEEN_STARTS, DISK)  # see tests.chaos.accidents
DISTURBED = (CLOCK, LATE_WRITER)  # training, with one rank that is not as the others
CLOCK_SECONDS = 600.0


@dataclass(frozen=True)
class Kill:
    """``phase`` of a save, or "start", "training" or one of ``DISTURBED``: then ``seconds`` after the
    launcher's start or after the first new metrics row. Or an accident: nobody is killed, and the run has no
    victim."""

    victim: str
    phase: str
    rank: int  # that comes to the phase, or that is the victim
    save: int = 1  # of this start: the first or the second
    seconds: float = 0.0
    amount: float = 0.0  # of the disturbance or the accident

    @property
    def in_save(self) -> bool:
        return self.phase in PHASES


def kills(seed: int) -> Iterator[Kill]:
    """Half in a phase of a save, each pair with a victim once before any repeats; half at random moments.
    After every two kills comes one of the others, each once before any repeats."""
    rng = random.Random(seed)
    others = _others(rng)
    while True:
        pairs = [(phase, victim) for phase in PHASES for victim in VICTIMS]
        rng.shuffle(pairs)
        for phase, victim in pairs:
            rank = rng.randrange(2) if phase in ON_EVERY_RANK else 0
            # The first save after a start removes nothing: the one resumed from is kept.
            save = 2 if phase == "removal" else rng.choice((1, 1, 2))
            yield Kill(victim, phase, rank, save)
            early = rng.random() < 0.2
            yield Kill(
                rng.choice(VICTIMS),
                START if early else TRAINING,
                rng.randrange(2),
                seconds=rng.uniform(0.0, 8.0) if early else rng.uniform(0.0, 2.5),
            )
            yield next(others)


def _others(rng: random.Random) -> Iterator[Kill]:
    while True:
        kinds = [*DISTURBED, *ACCIDENTS]
        rng.shuffle(kinds)
        for kind in kinds:
            if kind in ACCIDENTS:
                yield Kill("", kind, 0, seconds=rng.uniform(3.0, 12.0), amount=rng.random())
                continue
            amount = rng.choice((-CLOCK_SECONDS, CLOCK_SECONDS)) if kind == CLOCK else rng.uniform(0.5, 2.0)
            yield Kill(
                rng.choice(VICTIMS), kind, rng.randrange(2), seconds=rng.uniform(0.0, 6.0), amount=amount
            )
