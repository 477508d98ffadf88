"""A run folder with damaged or missing files is refused with one UserError that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.trainer import Trainer
from alignkd.errors import UserError
from alignkd.run_folder.checkpoints import step_folder
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from launcher.run.checkpoints import changes_allowed
from tests import tiny
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.ranks import RankPool


def message_of(ranks: Ranks, run: str) -> str:
    try:
        prepare(Path(run), ranks, Progress(Path(run), writes=False))
    except UserError as error:
        return str(error)
    return "prepared"


def replaced(name: str, text: str | bytes) -> Callable[[Path], Path]:
    def replace(run: Path) -> Path:
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return run / name

    return replace


def removed(name: str) -> Callable[[Path], Path]:
    def remove(run: Path) -> Path:
        (run / name).unlink()
        return run / name

    return remove


DAMAGES: list[tuple[Callable[[Path], Path], str]] = [
    (replaced("ds/student.json", '{"train_batch'), "cannot be read as JSON"),
    (replaced("ds/student.json", b"\xff\xfe{}"), "cannot be read as JSON"),
    (replaced("ds/student.json", "[]"), "must hold a JSON object"),
    (replaced("ds/student.json", "{}"), "gradient_accumulation_steps"),
    (removed("ds/student.json"), "no such file"),
    (replaced("ds/teacher.json", ""), "cannot be read as JSON"),
    (removed("ds/teacher.json"), "no such file"),
]


def test_a_damaged_or_missing_deepspeed_file_is_named(one_rank: RankPool, tmp_path: Path) -> None:
    for number, (damage, named) in enumerate(DAMAGES):
        run = tiny.write_run(tmp_path / f"run{number}", 1)
        path = damage(run)
        (message,) = one_rank.run(message_of, str(run))
        assert message.startswith(f"{path}: ")
        assert named in message


@pytest.fixture(scope="module")
def trained(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny.write_run(tmp_path_factory.mktemp("trained") / "run", 1, training__max_steps=2)
    assert [code for code, _ in one_rank.run(go_on, str(run))] == [0]
    return run


@pytest.mark.parametrize("text", ['["training.lea', '"a"', "[1]", ""])
def test_a_damaged_list_of_accepted_changes_is_named(one_rank: RankPool, trained: Path, text: str) -> None:
    path = trained / "allowed_changes.json"
    path.write_text(text)
    (message,) = one_rank.run(message_of, str(trained))
    path.unlink()
    assert message.startswith(f"{path}: holds no keys with their values; remove it")
    assert "--allow-change" in message


def test_steps_skipped_in_a_row_are_counted_across_a_resume(
    one_rank: RankPool, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = step_folder(run, 2) / "manifest.json"
    facts = json.loads(path.read_text())
    assert facts["skipped_in_a_row"] == 0
    assert one_rank.run(skipped_in_a_row, str(run)) == [0]
    path.write_text(json.dumps({**facts, "skipped_in_a_row": 2}))
    path.with_name("COMMITTED").write_text("")  # its marker would not fit the manifest any more
    assert one_rank.run(skipped_in_a_row, str(run)) == [2]


def skipped_in_a_row(ranks: Ranks, run: str) -> int:
    progress = Progress(Path(run), writes=ranks.is_first)
    return Trainer(prepare(Path(run), ranks, progress), StopRequest(), progress).skipped.in_a_row


def test_images_of_other_sizes_are_refused_and_other_times_named(
    one_rank: RankPool, trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    images = Path(shutil.copytree(tiny.FOLDER, tmp_path / "images"))
    config = RunPaths(run).config
    config.write_text(config.read_text().replace(f"image_folder: {tiny.FOLDER}", f"image_folder: {images}"))
    assert str(images) in config.read_text()
    assert one_rank.run(skipped_in_a_row, str(run)) == [0]  # they may move
    assert "modification times" not in one_rank.log(0)
    files = [path for path in images.rglob("*") if path.suffix in (".png", ".jpg")]
    assert files
    for path in files:
        os.utime(path, (1000, 1000))
    assert one_rank.run(skipped_in_a_row, str(run)) == [0]
    assert "image files have other modification times than before" in one_rank.log(0)
    for path in files:
        path.write_bytes(path.read_bytes() + b"x")
    (message,) = one_rank.run(message_of, str(run))
    assert "data.images: image files have other sizes than before" in message
    with changes_allowed(run, ["data.images"]):
        assert one_rank.run(skipped_in_a_row, str(run)) == [0]
        assert "data.images: image files have other sizes than before" in one_rank.log(0)
    # A later checkpoint, with other images: another change is another decision.
    path = step_folder(run, 2) / "manifest.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"images": {"sizes": "ab", "times": "cd"}}))
    path.with_name("COMMITTED").write_text("")
    (message,) = one_rank.run(message_of, str(run))
    assert "data.images: image files have other sizes than before" in message
