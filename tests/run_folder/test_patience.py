from __future__ import annotations

from pathlib import Path

from alignkd.run_folder.patience import Patience


class Time:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def patience(self, seconds: float) -> Patience:
        return Patience(seconds, clock=lambda: self.now, sleep=self.sleep)


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    time = Time()
    assert time.patience(30).until_exists(tmp_path)
    assert time.slept == 0


def test_a_file_that_appears_late_is_found(tmp_path: Path) -> None:
    time, late = Time(), tmp_path / "late"

    def sleep(seconds: float) -> None:
        time.sleep(seconds)
        if time.slept >= 7:
            late.touch()

    assert Patience(30, clock=lambda: time.now, sleep=sleep).until_exists(late)
    assert 7 <= time.slept < 9


def test_a_thousand_missing_files_are_waited_for_once(tmp_path: Path) -> None:
    time = Time()
    patience = time.patience(30)
    assert not any(patience.until_exists(tmp_path / str(number)) for number in range(1000))
    assert time.slept == 30
    assert patience.until_exists(tmp_path)
