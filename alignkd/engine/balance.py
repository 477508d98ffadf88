"""The weights of the loss terms in use, which ``distillation.balance`` lets follow the training.

They are plain numbers, the same on all ranks: what they are computed from has been reduced over the ranks.
Learned weights follow the values of the metrics rows, which reach the host a step late, so nothing here waits
for the device. A save or a resume knows these values sooner, and uses them no sooner: a run has the same
weights however often it is saved and stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignkd.config.schema import DistillationSection
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.state import TrainingState
from alignkd.losses.balance import LearnedWeights, balanced_weights, with_focus
from alignkd.losses.total import TERMS
from alignkd.run_folder.checkpoints import read_manifest, step_folder
from alignkd.run_folder.metrics import WEIGHT_OF

BALANCE = "balance"  # key of a checkpoint's manifest


class Balance:
    """The weights of one run in one process. Between steps, ``weights`` are those of the next one."""

    def __init__(self, distillation: DistillationSection, manifest: Mapping[str, Any]) -> None:
        """``manifest``: of the checkpoint that was loaded; empty at a start."""
        self._distillation = distillation
        self._kind = distillation.balance if distillation.enabled else "fixed"
        self._base = term_weights(distillation)
        self.weights = weights_in_use(distillation, manifest)
        saved = _saved(distillation, manifest)
        self._learned: LearnedWeights | None = None
        if self._kind == "learned":
            self._learned = LearnedWeights(self._base)
            self._learned.load_state(saved.get("learned", {}))
        self._late: dict[str, float] | None = saved.get("late")  # means of the last step before a resume

    @classmethod
    def of_run(cls, state: TrainingState) -> Balance:
        """As it was in the checkpoint that was loaded."""
        step = state.found.step
        manifest = {} if step is None else read_manifest(step_folder(state.run, step))
        return cls(state.config.distillation, manifest)

    def is_due(self, step: int) -> bool:
        """Whether ``step`` begins with a measurement of the terms' gradients."""
        return self._kind == "gradient" and step % self._distillation.balance_every == 0

    def follow(self, norms: Mapping[str, float]) -> None:
        """``norms``: of each term's gradient, over all ranks, with the present weights."""
        self.weights = balanced_weights(norms, self.weights, self._base)

    def learn(self, row: Mapping[str, Any] | None) -> None:
        """After a step was launched. ``row``: the metrics of the step before it; None where this process did
        not take that step."""
        if self._learned is None:
            return
        means, self._late = (self._late if row is None else self._means(row)), None
        if means is not None:
            self._learned.learn(means)
            self.weights = self._learned.weights

    def columns(self) -> dict[str, float]:
        """What the row of a step says of the present weights; nothing of fixed ones."""
        if self._kind == "fixed":
            return {}
        used = {
            term: weight for term, weight in self.weights.items() if term != "ce" and self._base[term] > 0
        }
        return {WEIGHT_OF + self._shown(term): weight for term, weight in used.items()}

    def facts(self, row: Mapping[str, Any] | None) -> dict[str, Any]:
        """For the manifest of a checkpoint; nothing of fixed weights. ``row``: the metrics of its step."""
        if self._kind == "fixed":
            return {}
        found: dict[str, Any] = {"kind": self._kind, "base": self._base, "weights": self.weights}
        if self._learned is not None:
            found |= {
                "learned": self._learned.state(),
                "late": self._late if row is None else self._means(row),
            }
        return {BALANCE: found}

    def _means(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {term: row[self._shown(term)] for term in TERMS}

    def _shown(self, term: str) -> str:
        """Its name in metrics rows."""
        return self._distillation.divergence if term == "divergence" else term


def weights_in_use(distillation: DistillationSection, manifest: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each term after the step of the checkpoint with this ``manifest``."""
    base = term_weights(distillation)
    return with_focus(base | _saved(distillation, manifest).get("weights", {}), base)


def _saved(distillation: DistillationSection, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint knows of the balance, without the terms that had another configured weight: they
    begin anew, and so do all where the checkpoint had another kind of balance, or none."""
    saved: dict[str, Any] = manifest.get(BALANCE, {})
    is_same = distillation.enabled and saved.get("kind") == distillation.balance
    if not is_same:
        return {}
    same = {
        term
        for term, weight in term_weights(distillation).items()
        if saved.get("base", {}).get(term) == weight
    }
    by_term = {part: saved[part] for part in ("weights", "learned") if part in saved}
    return saved | {
        part: {term: value for term, value in values.items() if term in same}
        for part, values in by_term.items()
    }
