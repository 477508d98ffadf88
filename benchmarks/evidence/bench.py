"""Everything that the runs share, built once and kept in a folder: task, teacher, its patches and targets."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.evidence.loop import Examples
from benchmarks.evidence.models import (
    BETTER_TEACHER_FILE,
    TEACHER_FILE,
    all_patches,
    load_teacher,
    takes_patches,
    write_folders,
)
from benchmarks.evidence.patches import VARIANTS
from benchmarks.evidence.targets import TargetStore, standard_forward, teacher_targets
from benchmarks.evidence.task import Sizes, Splits, build_task, task_digest

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    cache: Path
    teacher_file: Path
    teacher: str  # first digits of the file's sha256
    better_file: Path | None
    data: str  # of the task's
    task: Splits
    patches: torch.Tensor
    tower_of_teacher: bool = True  # whether the students' tower is in the teacher's file

    def teacher_of(self, *, distilled: bool) -> str | None:
        """What a record names as its teacher: None when the run used nothing of it."""
        return self.teacher if distilled or self.tower_of_teacher else None

    def examples(self, split: str, top_k: int = 16) -> Examples:
        return Examples(getattr(self.task, split), self.patches, top_k)

    @property
    def better_teacher(self) -> str:
        return digest_of(self._better_file)

    @property
    def _better_file(self) -> Path:
        assert self.better_file is not None, "no condition of this task has a better teacher"
        return self.better_file

    def targets(self, variant: str | None, better_teacher: bool = False) -> TargetStore:
        """Of the training samples, with the attention of ``variant`` (None: the product's)."""
        forward = standard_forward if variant is None else VARIANTS[variant].teacher_forward
        file = self._better_file if better_teacher else self.teacher_file

        def computed() -> TargetStore:
            return teacher_targets(
                takes_patches(load_teacher(self.cache, file)), self.examples("train"), forward
            )

        return kept(self.cache / f"targets-{variant or 'standard'}-{digest_of(file)}.pt", computed)


@lru_cache(maxsize=1)
def open_bench(
    root: Path,
    sizes: Sizes,
    teacher_file: Path = TEACHER_FILE,
    better_file: Path = BETTER_TEACHER_FILE,
) -> Bench:
    """``root`` gets a folder for this task and this teacher. The task is built each time, which takes
    seconds, so that a change of the code that builds it gives another digest and another folder."""
    digest = digest_of(teacher_file)
    with tempfile.TemporaryDirectory() as folder:
        task = build_task(write_folders(Path(folder)), sizes)
    data = task_digest(task)
    cache = root / f"{digest}-{data}"
    cache.mkdir(parents=True, exist_ok=True)
    write_folders(cache)
    teacher = load_teacher(cache, teacher_file)
    patches = kept(cache / "patches.pt", lambda: all_patches(teacher, task.pixels))
    return Bench(cache, teacher_file, digest, better_file, data, task, patches)


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], T]) -> T:
    """What ``path`` holds, made first if it does not exist. Our own pickles, in a folder of our own."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.tmp")  # another process may be making the same
        torch.save(make(), partial)
        partial.rename(path)
    found: T = torch.load(path, weights_only=False, mmap=True)
    return found
