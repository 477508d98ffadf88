"""A run folder with damaged or missing files is refused with one UserError that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.errors import UserError
from alignkd.run_folder.progress import Progress
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


@pytest.mark.parametrize("text", ['["training.lea', '{"a": 1}', "[1]", ""])
def test_a_damaged_list_of_accepted_changes_is_named(one_rank: RankPool, trained: Path, text: str) -> None:
    path = trained / "allowed_changes.json"
    path.write_text(text)
    (message,) = one_rank.run(message_of, str(trained))
    path.unlink()
    assert message.startswith(f"{path}: not a JSON list of keys; remove it")
    assert "--allow-change" in message
