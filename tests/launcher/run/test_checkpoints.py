"""Checkpoint folders as the engine leaves them, made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignkd.config import load_run_config
from alignkd.errors import UserError
from alignkd.run_folder.checkpoints import MANIFEST, MARKER
from alignkd.run_folder.drift import accepts_images, allowed_changes
from alignkd.run_folder.verification import describe
from launcher.run.checkpoints import changes_allowed, check_changes, list_checkpoints

CONFIG = "model: {student: /s, teacher: /t}\ndata: {sources: [{file: /d.json}]}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def checkpoint(run: Path, step: int, *, committed: bool = True, suffix: str = "") -> Path:
    folder = run / "checkpoints" / f"step-{step}{suffix}"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"weights")
    facts = {"step": step, "world_size": 2, "config": {"student": {"zero_stage": 2}}}
    (folder / MANIFEST).write_text(json.dumps(facts | {"files": {"shard.pt": describe(folder, "shard.pt")}}))
    if committed:
        (folder / MARKER).touch()
    return folder


def test_checkpoints_are_listed_in_the_order_of_steps_with_their_states(run: Path) -> None:
    checkpoint(run, 10)
    checkpoint(run, 9)
    checkpoint(run, 11, committed=False)
    checkpoint(run, 12, committed=False, suffix=".tmp")
    listed = [(row.name, row.state) for row in list_checkpoints(run, verify=False)]
    assert listed == [
        ("step-9", "committed"),
        ("step-10", "committed"),
        ("step-11", "not committed"),
        ("step-12.tmp", "not committed"),
    ]
    assert {row.world_size for row in list_checkpoints(run, verify=False)} == {2}


def test_verify_names_what_is_broken(run: Path) -> None:
    checkpoint(run, 1)
    (checkpoint(run, 2) / "shard.pt").write_bytes(b"weightz")
    (checkpoint(run, 3) / "stranger.pt").write_bytes(b"")
    (checkpoint(run, 4) / MANIFEST).write_text("{")
    verified = list_checkpoints(run, verify=True)
    assert [row.state for row in verified] == ["verified", "broken", "broken", "broken"]
    assert "another sha256" in verified[1].problems[0]
    assert "stranger.pt is not in the manifest" in verified[2].problems
    assert "cannot be read" in verified[3].problems[0]


def test_the_verify_command_prints_json_and_fails_on_damage(run: Path) -> None:
    (checkpoint(run, 2) / "shard.pt").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "ckpt", "verify", str(run), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["problems"] == ["shard.pt is missing"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        list_checkpoints(tmp_path, verify=False)


def test_allowed_changes_add_up_and_unknown_keys_are_refused(run: Path) -> None:
    for key in ("training.learning_rate", "distillation.temperature"):
        with changes_allowed(run, [key]):
            pass
    config = load_run_config(run / "config.yaml")
    kept = {
        "distillation.temperature": config.distillation.temperature,
        "training.learning_rate": config.training.learning_rate,
    }
    assert json.loads((run / "allowed_changes.json").read_text()) == kept
    with pytest.raises(RuntimeError), changes_allowed(run, ["data.seed"]):
        raise RuntimeError
    assert json.loads((run / "allowed_changes.json").read_text()) == kept
    (run / "allowed_changes.json").write_text('["training.le')
    with (
        pytest.raises(UserError, match="holds no keys with their values"),
        changes_allowed(run, ["data.seed"]),
    ):
        pass
    with pytest.raises(UserError, match="start a new run"):
        check_changes(run, ["training.precision"])
    with pytest.raises(UserError, match=r"did you mean training\.learning_rate"):
        check_changes(run, ["training.learning_rat"])


def test_images_are_accepted_as_a_change_from_the_checkpoints_that_there_are(run: Path) -> None:
    for step, sizes in ((1, "ab"), (2, "cd"), (3, "cd"), (4, None)):
        path = checkpoint(run, step) / MANIFEST
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | ({} if sizes is None else {"images": {"sizes": sizes}})))
    (checkpoint(run, 5) / MANIFEST).write_text("{")
    check_changes(run, ["data.images"])
    for keys in (["data.images"], ["data.seed"]):
        with changes_allowed(run, keys):
            pass
    assert allowed_changes(run)["data.images"] == ["ab", "cd"]
    assert accepts_images(allowed_changes(run), "cd")
    assert not accepts_images(allowed_changes(run), "ef")
    assert not accepts_images({}, "ab")
