"""Everything that the runs share, built once and kept in a folder: task, teacher, its patches and targets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.evidence.loop import Examples
from benchmarks.evidence.models import TEACHER_FILE, all_patches, load_teacher, takes_patches, write_folders
from benchmarks.evidence.patches import VARIANTS
from benchmarks.evidence.targets import TargetStore, standard_forward, teacher_targets
from benchmarks.evidence.task import Sizes, Task, build_task

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    cache: Path
    teacher_file: Path
    teacher: str  # first digits of the file's sha256
    task: Task
    patches: torch.Tensor

    def examples(self, split: str, top_k: int = 16) -> Examples:
        return Examples(getattr(self.task, split), self.patches, top_k)

    def targets(self, variant: str | None) -> TargetStore:
        """Of the training samples, with the attention of ``variant`` (None: the product's)."""
        forward = standard_forward if variant is None else VARIANTS[variant].teacher_forward

        def computed() -> TargetStore:
            teacher = takes_patches(load_teacher(self.cache, self.teacher_file))
            return teacher_targets(teacher, self.examples("train"), forward)

        return _kept(self.cache / f"targets-{variant or 'standard'}.pt", computed)


@lru_cache(maxsize=1)
def open_bench(root: Path, sizes: Sizes, teacher_file: Path = TEACHER_FILE) -> Bench:
    """``root`` gets a folder for these sizes and this teacher."""
    digest = hashlib.sha256(teacher_file.read_bytes()).hexdigest()[:12]
    key = hashlib.sha256(json.dumps(asdict(sizes)).encode()).hexdigest()[:8]
    cache = root / f"{digest}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = write_folders(cache)
    task = _kept(cache / "task.pt", lambda: build_task(tokenizer, sizes))
    teacher = load_teacher(cache, teacher_file)
    patches = _kept(cache / "patches.pt", lambda: all_patches(teacher, task.pixels))
    return Bench(cache, teacher_file, digest, task, patches)


def _kept(path: Path, make: Callable[[], T]) -> T:
    """What ``path`` holds, made first if it does not exist. Our own pickles, in a folder of our own."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # another process may be making the same
        torch.save(make(), partial)
        partial.rename(path)
    kept: T = torch.load(path, weights_only=False, mmap=True)
    return kept
