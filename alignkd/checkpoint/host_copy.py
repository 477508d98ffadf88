"""A copy of a state in host memory, which training cannot change while it is written."""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

MEMORY_MARGIN = 1.1
CONTROL_GROUPS = Path("/sys/fs/cgroup")
_GROUP_FILES = (  # limit, usage, and the entry of memory.stat that can be reclaimed: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host_copy(state: Any, copies: int = 1) -> Any:
    """``state`` with every tensor on the host; containers and other objects are copied too.

    ``copies``: how many ranks of this host copy as much at the same time.

    A storage that several tensors share is copied once and shared again, so the copy is as large as the
    original, in memory and when it is written. On an accelerator the copies go to pinned memory and are
    complete when this returns. Raises OSError (ENOMEM) when the host has no room, RuntimeError for tensors in
    containers other than dicts, lists and tuples, and for subclasses of tensors: DeepSpeed has neither.
    """
    needed = _bytes_to_take(_storages(state))
    together = needed * copies
    free = free_host_bytes()
    if together * MEMORY_MARGIN > free:
        raise OSError(errno.ENOMEM, f"{free:,} bytes of host memory free, the copies take {together:,}")
    copied = _Copier().copy(state)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().synchronize()  # the copies above were only launched
    return copied


class _Copier:
    def __init__(self) -> None:
        # The originals are kept too: the address of a freed one could be used again.
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def copy(self, value: Any) -> Any:
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
            return self._tensor(value)
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the type and attributes such as a state dict's _metadata
            for key, item in value.items():
                copied[key] = self.copy(item)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.copy(item) for item in value)
        # Numbers, names, shapes, a loss scaler. A tensor in it would be copied on its own device.
        met: dict[int, Any] = {}
        copied = copy.deepcopy(value, met)
        if any(isinstance(part, torch.Tensor) for part in met.values()):
            raise RuntimeError(f"it holds tensors in a {type(value).__name__}, which is not copied")
        return copied

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        storage = self._storage(value.untyped_storage())
        with torch.no_grad():
            copied = torch.empty(0, dtype=value.dtype).set_(
                storage, value.storage_offset(), value.size(), value.stride()
            )
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=value.requires_grad)
        return copied

    def _storage(self, original: torch.UntypedStorage) -> torch.UntypedStorage:
        key = original._cdata
        if key not in self._copies:
            pinned = original.device.type != "cpu"
            source = torch.empty(0, dtype=torch.uint8, device=original.device).set_(original)
            target = torch.empty(original.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            target.copy_(source, non_blocking=pinned)
            self._copies[key] = (original, target.untyped_storage())
        return self._copies[key][1]


def _storages(state: Any) -> list[torch.UntypedStorage]:
    """The distinct storages in ``state``."""
    return list(
        {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(state)}.values()
    )


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        if state.layout is torch.strided:
            yield state
    elif isinstance(state, dict):
        for item in state.values():
            yield from _tensors(item)
    elif isinstance(state, list | tuple):
        for item in state:
            yield from _tensors(item)


def _bytes_to_take(storages: Iterable[torch.UntypedStorage]) -> int:
    """Bytes of the host's free memory that copies of ``storages`` take. Torch rounds pinned memory up to
    powers of two, and keeps what is freed for the next copies."""
    pageable = pinned = 0
    for storage in storages:
        if storage.device.type == "cpu":
            pageable += storage.nbytes()
        elif storage.nbytes():
            pinned += 1 << (storage.nbytes() - 1).bit_length()
    return pageable + max(pinned - _idle_pinned_bytes(), 0)


def _idle_pinned_bytes() -> int:
    """Pinned memory that torch's allocator holds and nobody uses."""
    statistics = torch.cuda.host_memory_stats() if torch.cuda.is_available() else {}
    held, used = (int(statistics.get(f"{name}_bytes.current", 0)) for name in ("allocated", "active"))
    return max(held - used, 0)


def free_host_bytes() -> int:
    """Memory that this process can still take, from the machine and within its control groups (by which Slurm
    and containers limit a job)."""
    meminfo = Path("/proc/meminfo").read_text()
    free = (
        int(next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:")).split()[1]) * 1024
    )
    try:
        memberships = Path("/proc/self/cgroup").read_text()
    except OSError:
        return free
    for folder in _control_groups(memberships):
        free = min(free, _free_in_group(folder, free))
    return max(free, 0)


def _control_groups(memberships: str) -> Iterator[Path]:
    """Folders of the groups that may limit memory, with their parents. ``memberships``: /proc/self/cgroup."""
    for line in memberships.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root = CONTROL_GROUPS
        elif "memory" in controllers.split(","):
            root = CONTROL_GROUPS / "memory"  # version 1
        else:
            continue
        folder = root / group.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _free_in_group(folder: Path, otherwise: int) -> int:
    for limit_name, used_name, inactive in _GROUP_FILES:
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # File pages that were not used lately are freed when memory is needed.
        return otherwise if limit == "max" else int(limit) - used + int(statistics.get(inactive, 0))
    return otherwise
