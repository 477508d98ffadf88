"""Which processes are killed next, and when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.checkpoint.faulty_storage import PHASES, VICTIMS

ON_EVERY_RANK = ("snapshot", "between", "shards", "flush")
START, TRAINING = "start", "training"


@dataclass(frozen=True)
class Kill:
    """``phase`` of a save, or "start" or "training": then ``seconds`` after the launcher's start or after the
    first new metrics row."""

    victim: str
    phase: str
    rank: int  # that comes to the phase, or that is the victim
    save: int = 1  # of this start: the first or the second
    seconds: float = 0.0

    @property
    def in_save(self) -> bool:
        return self.phase in PHASES


def kills(seed: int) -> Iterator[Kill]:
    """Half in a phase of a save, each pair with a victim once before any repeats; half at random moments."""
    rng = random.Random(seed)
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
