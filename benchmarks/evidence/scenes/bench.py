"""Everything that the runs about scenes share, and their teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from alignkd.config.schema import TrainingSection
from alignkd.data.sample_task import folders
from alignkd.models.families.mobilevlm import MobileVLM
from benchmarks.evidence.bench import Bench, digest_of, kept
from benchmarks.evidence.loop import Examples
from benchmarks.evidence.models import (
    from_scratch,
    load_teacher,
    train_on_labels,
    write_in_half_precision,
)
from benchmarks.evidence.scenes.cutouts import read_sources
from benchmarks.evidence.scenes.task import (
    SceneSizes,
    build_scenes,
    scene_patches,
    scenes_digest,
    write_scene_folders,
)

TEACHER_FILE = Path(__file__).parent / "teacher.safetensors"  # in half precision, without the tower
TEACHER_STEPS = 12_000
TEACHER_SEED = 7
BATCH = 16
SIZES = SceneSizes()


@lru_cache(maxsize=1)
def open_scenes(root: Path, sizes: SceneSizes = SIZES, teacher_file: Path = TEACHER_FILE) -> Bench:
    """``root`` holds the pictures (docs/evidence.md) and gets a folder for this task and this teacher."""
    sources = read_sources(root)
    with tempfile.TemporaryDirectory() as folder:
        task = build_scenes(write_scene_folders(Path(folder)), sources, sizes)
    digest, data = digest_of(teacher_file), scenes_digest(task, sources)
    cache = root / f"{digest}-{data}"
    cache.mkdir(exist_ok=True)
    write_scene_folders(cache)
    load_teacher(cache, teacher_file)
    patches = kept(
        cache / "patches.pt", lambda: scene_patches(task.scenes, sources, _patches(root), root / "packages")
    )
    return Bench(cache, teacher_file, digest, None, data, task, patches, tower_of_teacher=False)


def train_scene_teacher(
    root: Path,
    sizes: SceneSizes,
    steps: int,
    out: Path,
    after_step: Callable[[MobileVLM, int], None] = lambda model, step: None,
) -> None:
    """The demo's teacher with the pretrained tower, from scratch on the labels, saved to ``out``."""
    sources = read_sources(root)
    with tempfile.TemporaryDirectory() as folder:
        task = build_scenes(write_scene_folders(Path(folder)), sources, sizes)
        model = from_scratch(Path(folder), "teacher", TEACHER_SEED, Path(folder) / folders.TOWER)
    patches = scene_patches(task.scenes, sources, _patches(root), root / "packages")
    settings = TrainingSection(learning_rate=1e-3, global_batch_size=BATCH, seed=TEACHER_SEED)
    train_on_labels(model, Examples(task.train, patches), settings, steps, after_step)
    write_in_half_precision(model, out, with_tower=False)


def _patches(root: Path) -> Path:
    folder = root / "patches"
    folder.mkdir(exist_ok=True)
    return folder
