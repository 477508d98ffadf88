"""How shards are written and read for DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkd.checkpoint.shard_files import ShardFiles
from alignkd.errors import CheckpointError

SIZE = 64 << 20


def memory_of_this_process() -> int:
    """Bytes that are no pages of a file: what other processes cannot share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_a_shard_is_mapped_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"weight": torch.ones(SIZE // 4)}}, path)
    files = ShardFiles()
    files.verified = frozenset([path])
    before = memory_of_this_process()
    # As DeepSpeed asks for it.
    weight = files.load(str(path), map_location=lambda storage, _location: storage)["module"]["weight"]
    assert float(weight.sum()) == SIZE // 4  # every page was read
    assert memory_of_this_process() - before < SIZE // 4
    # Private: on the CPU training changes it in place, and the file must not change.
    weight.zero_()
    assert float(files.load(str(path), map_location="cpu")["module"]["weight"].sum()) == SIZE // 4


def test_a_write_that_fails_is_remembered_and_not_raised(tmp_path: Path) -> None:
    """DeepSpeed's save has barriers: a rank that left it by an exception would deadlock the others."""
    files = ShardFiles()
    files.begin(copies=False)
    files.save({}, str(tmp_path / "missing" / "shard.pt"))
    assert files.problem is not None
    files.save({}, str(tmp_path / "shard.pt"))  # nothing more is written into a save that has failed
    assert files.written == []
    assert list(tmp_path.iterdir()) == []
    files.begin(copies=False)
    files.save({}, str(tmp_path / "shard.pt"))
    assert (files.written, files.problem) == ([tmp_path / "shard.pt"], None)


def test_a_file_that_was_not_verified_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "shard.pt")
    with pytest.raises(CheckpointError, match="was not verified"):
        ShardFiles().load(str(tmp_path / "shard.pt"))
