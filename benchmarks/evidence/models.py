"""The models of the sample task: a teacher that is trained once, and students that share its tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from alignkd.config.schema import DistillationSection, ModelSection, TrainingSection
from alignkd.data.sample_task import folders
from alignkd.data.sample_task.tokenizer import train_tokenizer
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.engine.student_step import StudentStep
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.families.mobilevlm_loading import load_model, load_student
from alignkd.models.saving import save_model_folder, write_tensors
from benchmarks.evidence.loop import Examples, train
from benchmarks.evidence.task import DATA_SEED, Task

# In half precision, which is what the runs use (in fp32): the file is all that a later machine needs, where
# training it again would give slightly different weights.
TEACHER_FILE = Path(__file__).parent / "teacher.safetensors"
TEACHER_STEPS = 2500
BETTER_TEACHER_FILE = TEACHER_FILE.with_name("better-teacher.safetensors")
BETTER_TEACHER_STEPS = 12_000
BETTER_TEACHER_SAMPLES = 128_000
FP32 = BuildOptions(torch.float32)


def write_folders(cache: Path) -> SentencePieceTokenizer:
    """The folders that models are built from, as ``alignkd sample-data`` writes them."""
    if not (cache / folders.TOWER / "model.safetensors").exists():
        tokenizer = train_tokenizer()
        folders.write_model_folder(cache / "teacher", folders.TEACHER_CONFIG, tokenizer)
        folders.write_model_folder(cache / "student", folders.STUDENT_CONFIG, tokenizer)
        folders.write_tower_folder(cache / folders.TOWER, DATA_SEED)
    return SentencePieceTokenizer.from_folder(cache / "student")


def train_teacher(cache: Path, task: Task, steps: int, out: Path) -> None:
    """The demo's teacher with its tower, from scratch on the labels, saved in half precision to ``out``."""
    section = ModelSection(
        student="scratch", student_config=str(cache / "teacher"), vision_tower=str(cache / folders.TOWER)
    )
    model, _ = load_student(section, DATA_SEED, FP32)
    assert isinstance(model, MobileVLM)
    model.unfreeze_vision_tower()
    module = StudentStep(model, None, DistillationSection(enabled=False))
    examples = Examples(task.train, task.pixels)
    settings = TrainingSection(learning_rate=1e-3, global_batch_size=32, seed=DATA_SEED)
    train(module, examples, settings, steps)
    write_in_half_precision(model, out)


def train_better_teacher(
    cache: Path,
    task: Task,
    steps: int,
    out: Path,
    after_step: Callable[[MobileVLM, int], None] = lambda model, step: None,
) -> None:
    """A second teacher of the same shape, from scratch on the labels of ``task``, which has more samples than
    students see, saved to ``out``.

    It has the tower of the first one, frozen, as the students do. So the student alone and the start of every
    student are the same under both teachers.
    """
    model = from_scratch(cache, "teacher", DATA_SEED + 1, _teachers_tower(cache))
    examples = Examples(task.train, all_patches(load_teacher(cache), task.pixels))
    settings = TrainingSection(learning_rate=5e-4, global_batch_size=32, seed=DATA_SEED + 1)
    train_on_labels(model, examples, settings, steps, after_step)
    write_in_half_precision(model, out)


def train_on_labels(
    model: MobileVLM,
    examples: Examples,
    settings: TrainingSection,
    steps: int,
    after_step: Callable[[MobileVLM, int], None] = lambda model, step: None,
) -> None:
    module = StudentStep(model, None, DistillationSection(enabled=False))
    train(module, examples, settings, steps, after_step=lambda step: after_step(model, step))


def write_in_half_precision(model: MobileVLM, out: Path, *, with_tower: bool = True) -> None:
    tensors = {
        model.public_name(name): value.data.half()
        for name, value in model.named_parameters()
        if with_tower or not model.is_vision_tower(name)
    }
    write_tensors(tensors, out)


def load_teacher(cache: Path, file: Path = TEACHER_FILE) -> MobileVLM:
    """The frozen teacher in fp32. Its folder in ``cache`` supplies the students' tower. A file without the
    tower's tensors leaves it as it was before the teacher's training."""
    folder = cache / f"trained-{file.stem}"
    if not folder.exists():
        section = ModelSection(
            student="scratch", student_config=str(cache / "teacher"), vision_tower=str(cache / folders.TOWER)
        )
        untrained = load_student(section, DATA_SEED, FP32)[0]
        tensors = {
            untrained.public_name(name): value.data
            for name, value in untrained.named_parameters()
            if untrained.is_vision_tower(name)
        } | {name: value.float() for name, value in load_file(file).items()}
        save_model_folder(folder, untrained.config, tensors, cache / "teacher")
    model = load_model(folder, FP32)
    return model.eval().requires_grad_(False)


def new_student(cache: Path, seed: int) -> MobileVLM:
    """From random weights, with the teacher's tower; takes patches [I, 1, P, C] in the place of pixels."""
    return from_scratch(cache, "student", seed, _teachers_tower(cache))


def _teachers_tower(cache: Path) -> Path:
    return cache / f"trained-{TEACHER_FILE.stem}"


def from_scratch(cache: Path, shape: str, seed: int, tower: Path) -> MobileVLM:
    section = ModelSection(student="scratch", student_config=str(cache / shape), vision_tower=str(tower))
    model, _ = load_student(section, seed, FP32)
    assert isinstance(model, MobileVLM)
    return takes_patches(model)


def takes_patches(model: MobileVLM) -> MobileVLM:
    """The frozen tower has run once for all runs: what a batch holds as pixels is its output."""
    setattr(model, "patches", lambda values: values[:, 0])  # noqa: B010 - mypy refuses a method's assignment
    return model


@torch.no_grad()
def all_patches(teacher: MobileVLM, pixels: torch.Tensor) -> torch.Tensor:
    """[images, 1, P, C] of the tower that teacher and students share."""
    return torch.cat([teacher.patches(part) for part in torch.split(pixels, 64)])[:, None]
