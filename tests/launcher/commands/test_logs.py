"""When ``alignkd logs --follow`` stops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.commands import logs
from launcher.run.attempts import Reason, begin, close


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text("=== attempt 1: here\nline\n")
    return tmp_path


def test_following_stops_when_the_files_say_that_the_run_is_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "current_state", None)  # not asked
    close(run, begin(run, "local", "here", None), Reason.DONE)
    assert list(logs.follow_run(run, 0)) == ["=== attempt 1: here\n", "line\n"]


def test_the_queue_is_asked_every_30_seconds_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job of an open attempt vanishes: no file tells."""
    begin(run, "7", "n1", None)
    states = iter(["queued", "running", "lost"])
    asked: list[float] = []
    now = [0.0]

    def ticks() -> Iterator[float]:
        while True:
            now[0] += 10.0
            yield now[0]

    def current_state(_run: Path) -> SimpleNamespace:
        asked.append(now[0])
        return SimpleNamespace(state=next(states))

    clock = ticks()
    monkeypatch.setattr(logs, "current_state", current_state)
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("launcher.run.logs.time.sleep", lambda _seconds: None)
    assert list(logs.follow_run(run, 0)) == ["=== attempt 1: here\n", "line\n"]
    assert len(asked) == 3
    assert all(later - earlier >= logs.QUEUE_SECONDS for earlier, later in pairwise(asked))
