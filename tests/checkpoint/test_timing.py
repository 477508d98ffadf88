from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkd.checkpoint.timing import lead_warning, measured_stop_seconds, stop_seconds

MANIFEST = {"step": 4, "step_seconds": 30.0, "timing": {"save_seconds": 90.0}}


def write(run: Path, step: int, manifest: object) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMMITTED").touch()


def test_a_step_and_a_save_are_measured_by_the_newest_checkpoint(tmp_path: Path) -> None:
    assert measured_stop_seconds(tmp_path) is None
    write(tmp_path, 2, {"step": 2, "step_seconds": 1.0, "timing": {"save_seconds": 2.0}})
    write(tmp_path, 4, MANIFEST)
    assert measured_stop_seconds(tmp_path) == 120.0


@pytest.mark.parametrize(
    "manifest", [{"step": 4}, {**MANIFEST, "timing": None}, {**MANIFEST, "timing": {}}, []]
)
def test_a_manifest_that_does_not_tell_warns_of_nothing(tmp_path: Path, manifest: object) -> None:
    write(tmp_path, 4, manifest)
    assert measured_stop_seconds(tmp_path) is None


def test_a_short_lead_is_named_with_what_would_do() -> None:
    assert lead_warning(None, 10) is None
    assert lead_warning(stop_seconds(MANIFEST), 120) is None
    warning = lead_warning(stop_seconds(MANIFEST), 119)
    assert warning is not None
    for part in ("took 120 s", "119 s ahead", "slurm.signal_seconds", "240 or more"):
        assert part in warning
