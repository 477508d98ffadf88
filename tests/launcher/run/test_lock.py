"""One launcher per run, against other processes of this machine."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from alignkd.errors import UserError
from launcher.run import lock as run_lock
from launcher.run.lock import is_locked, only_launcher


def test_a_second_launcher_is_refused_until_the_first_has_finished(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with only_launcher(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another launcher runs it"), only_launcher(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_looking_at_the_lock_does_not_refuse_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alignkd status` holds it for a moment; here until the launcher waits for the first time."""
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if seconds:
                fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(run_lock.time, "sleep", sleep)
        with only_launcher(tmp_path):
            assert waits[0] == 0 < waits[1]


def test_without_file_locks_every_launcher_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with only_launcher(tmp_path):
        assert not is_locked(tmp_path)
