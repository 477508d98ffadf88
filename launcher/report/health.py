"""Can the number be trusted? One line per fact, one value per run, and whether it is a cause for concern."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alignkd.text import counted, duration, listed
from launcher.report.numbers import percent
from launcher.report.run_facts import RunFacts

_LOW_GOODPUT = 0.8
_OK_STATES = ("done", "running", "queued")


@dataclass(frozen=True)
class Value:
    text: str
    concern: bool = False


@dataclass(frozen=True)
class Fact:
    name: str
    values: tuple[Value, ...]  # of each run


def facts_of(runs: Sequence[RunFacts]) -> list[Fact]:
    kinds: list[tuple[str, Callable[[RunFacts], Value]]] = [
        ("state", _state),
        ("steps", _steps),
        ("attempts", _attempts),
        ("steps lost", lambda run: Value(str(run.health.lost_steps), run.health.lost_steps > 0)),
        ("steps skipped", lambda run: Value(str(run.skipped_steps), run.skipped_steps > 0)),
        ("samples skipped", lambda run: Value(str(run.skipped_samples), run.skipped_samples > 0)),
        ("losses not finite", lambda run: Value(str(run.not_finite), run.not_finite > 0)),
        ("best checkpoint", _best),
        ("goodput", _goodput),
        ("wall time", lambda run: Value("-" if run.times is None else duration(run.times.wall))),
        ("ranks", _ranks),
        ("commit", _commit),
    ]
    return [Fact(name, tuple(value(run) for run in runs)) for name, value in kinds]


def _state(run: RunFacts) -> Value:
    told = run.health.detail if run.health.state != "done" else ""  # where the student is, then
    detail = f": {told}" if told else ""
    return Value(f"{run.health.state}{detail}", run.health.state not in _OK_STATES)


def _steps(run: RunFacts) -> Value:
    total = run.health.total_steps
    step = max(run.health.step, run.columns.last_step)
    return Value(f"{step} of {total}" if total else str(step), total is None or step < total)


def _attempts(run: RunFacts) -> Value:
    reasons = [reason for reason in run.health.reasons if reason != "done"]
    ended = f" ({listed(reasons)})" if reasons else ""
    return Value(f"{run.health.attempts}{ended}", bool(reasons))


def _goodput(run: RunFacts) -> Value:
    share = run.health.goodput
    return Value("-") if share is None else Value(percent(share), share < _LOW_GOODPUT)


def _best(run: RunFacts) -> Value:
    return Value("-" if run.health.best is None else str(run.health.best))


def _ranks(run: RunFacts) -> Value:
    ranks = f"{run.manifest.world_size} on {counted(run.manifest.nodes, 'node')}"
    slow = f", slow: {listed(run.health.slow_ranks)}" if run.health.slow_ranks else ""
    return Value(ranks + slow, bool(slow))


def _commit(run: RunFacts) -> Value:
    commit = run.manifest.git_commit
    if not commit:
        return Value("not recorded")
    dirty = commit.endswith("-dirty")
    return Value(commit.removesuffix("-dirty")[:10] + (" with local changes" if dirty else ""), dirty)
