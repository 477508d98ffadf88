"""Which runs of the scenes there are."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.conditions import BASELINE
from benchmarks.evidence.pool import Run
from benchmarks.evidence.run import Settings
from benchmarks.evidence.scenes.bench import BATCH

CACHE = Path("build/scenes")
TERMS = ("all", "logits", "attention", "vision", "attention x 100", "attention, row KL")
LONGER = tuple(f"{name}, twice the steps" for name in (BASELINE, "all", "vision"))
CONDITIONS = (BASELINE, *TERMS, *LONGER)
TUNING_SEED = 100
TUNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
STEPS = 2000
TUNING: tuple[Run, ...] = tuple(
    (BASELINE, TUNING_SEED, Settings(rate, STEPS, BATCH)) for rate in TUNING_RATES
)
SETTINGS = Settings(2e-3, STEPS, BATCH)  # the best of those on validation
