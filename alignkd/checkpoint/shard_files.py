"""How DeepSpeed's engines write and read their files here."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from alignkd.checkpoint.host_copy import host_copy
from alignkd.errors import CheckpointError

log = logging.getLogger(__name__)


class ShardFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's file access, with four differences.

    With ``copies`` set, a state is copied to host memory and written later (:meth:`Storage.write_files`). A
    failed write is remembered instead of raised: ``save_checkpoint`` has barriers, and a rank that left it by
    an exception would deadlock the others. Only files that were verified are unpickled, and they are mapped
    into memory instead of read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self.verified: frozenset[Path] = frozenset()
        self.begin(copies=False)

    def begin(self, *, copies: bool) -> None:
        """Before each ``save_checkpoint``."""
        self._copies = copies
        self.written: list[Path] = []
        self.waiting: list[tuple[Path, Any]] = []  # where each copy goes, and the copy
        self.problem: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.problem is not None:
            return
        if self._copies:
            try:
                self.waiting.append((Path(path), host_copy(state_dict, _copies_on_this_host(Path(path)))))
                return
            except (OSError, MemoryError, RuntimeError) as error:  # torch's allocators raise the last
                log.warning(
                    "cannot copy %s to host memory (%s): training waits while it is written", path, error
                )
        try:
            write_shard(state_dict, Path(path))
            self.written.append(Path(path))
        except OSError as error:
            self.problem = error

    def load(self, path: str, map_location: Any = None) -> Any:
        if Path(path) not in self.verified:
            raise CheckpointError(f"{path}: was not verified against a manifest")
        # Mapped: the ranks of a host read the model's weights from the same pages; otherwise each would hold
        # a copy of the whole file. It holds DeepSpeed's own objects, which `weights_only` would refuse.
        return torch.load(path, map_location=map_location, weights_only=False, mmap=True)


def _copies_on_this_host(path: Path) -> int:
    """How many ranks of this host write such a file now. The model's is one rank's, except at stage 3."""
    return 1 if path.name.startswith("mp_rank_") else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def attach_shard_files(engine: Any) -> ShardFiles:
    """Make ``engine`` write and read its shards through :class:`ShardFiles`."""
    files = ShardFiles()
    engine.checkpoint_engine = files
    # Copies of conversion scripts, which rank 0 alone writes, without handling errors.
    engine._copy_recovery_script = lambda _path: None
    return files


def shard_files(engine: Any) -> ShardFiles:
    """Those that were attached to ``engine``."""
    files = engine.checkpoint_engine
    assert isinstance(files, ShardFiles)
    return files


def write_shard(state: Any, path: Path) -> None:
    """As DeepSpeed writes it. Raises OSError, also where torch's writer raises RuntimeError on a full
    disk."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error
