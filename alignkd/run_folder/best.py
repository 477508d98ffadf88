"""The best checkpoint of a run: that with the lowest loss on held-out data, or with the highest accuracy
(``evaluation.best``).

Every checkpoint that was evaluated records its values in its manifest, so they come and go with it.

| key of a manifest | holds |
|---|---|
| evaluation | values by the names of metrics rows, such as ``loss`` |
| evaluated_on | ``data`` and ``samples`` of the losses, and under a value's name what only it depends on |

Values are compared where these agree: after a resume with other data, say, the best value is sought anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from alignkd.errors import UserError
from alignkd.run_folder.checkpoints import committed_steps, read_manifest, step_folder
from alignkd.run_folder.paths import RunPaths

EVALUATION = "evaluation"
EVALUATED_ON = "evaluated_on"
ACCURACY = "accuracy"  # the value that does not depend on held-out data, but on a task
BEST = "best"  # what a user writes instead of a step


@dataclass(frozen=True)
class Best:
    step: int
    value: float
    by: str  # the name of the value

    def __str__(self) -> str:
        value = f"accuracy {self.value:.4g}" if self.by == ACCURACY else f"{self.value:.4g} on held-out data"
        return f"step {self.step}, {value}"


def best_checkpoint(run: Path, name: str, evaluated_on: Mapping[str, Any] | None = None) -> Best | None:
    """The committed checkpoint with the best value of ``name``, of equals the earliest, among those that
    were evaluated on ``evaluated_on`` (None: on what the newest of all was); None when there is none.

    A manifest that is missing or damaged makes its checkpoint unusable, so it does not count. Raises OSError
    when one cannot be read now: it may be the best one's."""
    wanted = None if evaluated_on is None else _of_value(evaluated_on, name)
    values: list[tuple[int, object]] = []
    for step in committed_steps(run):
        try:
            manifest = read_manifest(step_folder(run, step))
            value = manifest.get(EVALUATION, {}).get(name)
            found = _of_value(manifest.get(EVALUATED_ON, {}), name)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if value is None:
            continue
        wanted = found if wanted is None else wanted
        if found == wanted:
            values.append((step, value))
    best = None
    for step, value in reversed(values):
        if is_better(value, name, best):
            best = Best(step, value, name)
    return best


def _of_value(evaluated_on: Mapping[str, Any], name: str) -> dict[str, Any]:
    keys = (name,) if name == ACCURACY else ("data", "samples", name)
    return {key: evaluated_on.get(key) for key in keys}


def best_of_run(run: Path) -> Best | None:
    """The best checkpoint by the run's own configuration. Raises UserError when that cannot be read, and
    OSError as :func:`best_checkpoint` does."""
    return best_checkpoint(run, _configured_value(run)) if _was_evaluated(run) else None


def best_step(run: Path) -> int:
    """For ``--step best``. Raises UserError for a folder that is no run, when no checkpoint was evaluated, or
    none can be told."""
    if not RunPaths(run).config.is_file():
        raise UserError(f"{run}: --step {BEST} is for a run folder, which has a config.yaml")
    try:
        best = best_of_run(run)
    except OSError as error:
        raise UserError(f"{run}: which checkpoint is the best cannot be told: {error}") from None
    if best is None:
        raise UserError(f"--step {BEST}: no checkpoint of {run} was evaluated (evaluation.every)")
    return best.step


def _was_evaluated(run: Path) -> bool:
    for step in committed_steps(run):
        try:
            if EVALUATION in read_manifest(step_folder(run, step)):
                return True
        except (FileNotFoundError, ValueError):
            continue
    return False


def _configured_value(run: Path) -> str:
    # Here: `status` imports this module, and most runs are not evaluated.
    from alignkd.config.dotted import get_value
    from alignkd.config.yaml_reader import read_yaml

    document = read_yaml(RunPaths(run).config)
    return str(get_value(document, ("evaluation", "best"), "loss"))


def is_better(value: object, name: str, best: Best | None) -> TypeGuard[float]:
    """Is ``value`` of ``name`` better than the best so far? One that is not finite never is."""
    if not isinstance(value, float) or not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best.value if name == ACCURACY else value < best.value
