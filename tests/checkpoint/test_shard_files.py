"""How shards are read for DeepSpeed."""

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


def test_a_file_that_was_not_verified_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "shard.pt")
    with pytest.raises(CheckpointError, match="was not verified"):
        ShardFiles().load(str(tmp_path / "shard.pt"))
