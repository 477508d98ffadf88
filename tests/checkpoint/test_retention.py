from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from alignkd.checkpoint import retention
from alignkd.checkpoint.retention import expired_steps, remove_expired
from alignkd.checkpoint.storage import Storage
from alignkd.config.checkpoint_section import CheckpointSection
from alignkd.run_folder.checkpoints import committed_steps, step_folder, universal_folder


@pytest.mark.parametrize(
    ("committed", "verified", "protected", "keep_last", "keep_every", "expected"),
    [
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), 2, None, [10, 20]),
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), None, None, []),
        ([10, 20, 30, 40], {10, 20, 30, 40}, {10}, 2, None, [20]),  # the one resumed from
        ([10, 20, 30, 40], {10, 20, 30, 40}, set(), 1, 20, [10, 30]),
        ([10, 20, 30, 40], {40}, set(), 2, None, []),  # one verified checkpoint is not two
        ([10, 20, 30, 40], {20, 40}, set(), 2, None, [10]),  # 30 is not verified: it neither counts nor goes
        ([10, 20], {10, 20, 30}, set(), 1, None, [10]),  # 30 was removed by hand
        ([], set(), set(), 1, None, []),
    ],
)
def test_only_what_is_older_than_enough_verified_checkpoints_expires(
    committed, verified, protected, keep_last, keep_every, expected
) -> None:
    assert expired_steps(committed, verified, protected, keep_last, keep_every) == expected


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4, 6 and 8, each with its conversion."""
    for step in (2, 4, 6, 8):
        for folder in (step_folder(tmp_path, step), universal_folder(tmp_path, step)):
            folder.mkdir(parents=True)
            (folder / "COMMITTED").touch()
    return tmp_path


def test_an_expired_checkpoint_is_removed_with_its_conversion(run: Path) -> None:
    remove_expired(run, CheckpointSection(keep_last=2), {2, 4, 6, 8}, None, Storage())  # type: ignore[call-arg]
    assert committed_steps(run) == [8, 6]
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-6", "step-6.universal", "step-8", "step-8.universal"}


def test_the_checkpoint_that_the_run_was_resumed_from_stays(run: Path) -> None:
    remove_expired(run, CheckpointSection(keep_last=1), {2, 4, 6, 8}, 4, Storage())  # type: ignore[call-arg]
    assert committed_steps(run) == [8, 4]


def test_retention_removes_a_link_and_not_the_checkpoint_that_it_points_to(run: Path, tmp_path: Path) -> None:
    elsewhere = step_folder(run, 2).rename(tmp_path / "elsewhere")
    step_folder(run, 2).symlink_to(elsewhere)
    remove_expired(run, CheckpointSection(keep_last=1), {2, 4, 6, 8}, None, Storage())  # type: ignore[call-arg]
    assert committed_steps(run) == [8]
    assert (elsewhere / "COMMITTED").exists()
    assert not step_folder(run, 2).is_symlink()


def test_a_checkpoint_that_cannot_be_removed_does_not_keep_the_others(run: Path) -> None:
    class Busy(Storage):
        def remove(self, folder: Path) -> None:
            if folder.name == "step-2":
                raise OSError(errno.EBUSY, "Device or resource busy")
            super().remove(folder)

    remove_expired(run, CheckpointSection(keep_last=1), {2, 4, 6, 8}, None, Busy())  # type: ignore[call-arg]
    assert committed_steps(run) == [8, 2]


def test_nothing_more_is_removed_once_the_run_is_another_process_s(run: Path) -> None:
    answers = iter([True, False])
    section = CheckpointSection(keep_last=1)  # type: ignore[call-arg]
    remove_expired(run, section, {2, 4, 6, 8}, None, Storage(), lambda: next(answers))
    assert committed_steps(run) == [8, 6, 4]


def evaluate(run: Path, step: int, loss: float) -> None:
    values = {"step": step, "evaluation": {"loss": loss}}
    (step_folder(run, step) / "manifest.json").write_text(json.dumps(values))


def test_the_best_checkpoint_stays_however_old_it_is(run: Path) -> None:
    evaluate(run, 2, 0.5)
    evaluate(run, 4, 0.25)
    evaluate(run, 6, 0.75)
    remove_expired(run, CheckpointSection(keep_last=1), {2, 4, 6, 8}, None, Storage())  # type: ignore[call-arg]
    assert committed_steps(run) == [8, 4]


def test_nothing_is_removed_while_the_best_one_cannot_be_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(retention, "best_checkpoint", failing)
    remove_expired(run, CheckpointSection(keep_last=1), {2, 4, 6, 8}, None, Storage())  # type: ignore[call-arg]
    assert committed_steps(run) == [8, 6, 4, 2]
