"""Whether teacher and student share tokens and preprocessing. Checked without torch, before a run starts."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from alignkd.config.schema import Config, DataSource, ModelSection
from alignkd.errors import CheckpointError
from alignkd.models import processor_files
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.table import Family, family_of, packing_problem

PIXEL_KEYS = (
    "size",
    "crop_size",
    "resample",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def student_folder(model: ModelSection) -> Path:
    """The folder whose config.json and tokenizer.model describe the student."""
    if model.student == "scratch":
        assert model.student_config is not None, "checked by the configuration"
        return Path(model.student_config)
    return Path(model.student)


def student_model_config(model: ModelSection) -> MobileVLMConfig:
    return read_model_config(student_folder(model), model.vision_tower)


def tokenizer_hash(folder: Path) -> str:
    """sha256 of ``tokenizer.model``. Raises CheckpointError when the folder has none."""
    path = folder / "tokenizer.model"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise CheckpointError(
            f"{path}: no such file; a model folder needs its sentencepiece tokenizer"
        ) from None


def check_agreement(model: ModelSection, top_k: int) -> list[str]:
    """Every reason why this teacher cannot distil this student (empty: none)."""
    problems: list[str] = []
    families: list[Family | None] = []
    readable: list[Path] = []
    for folder in [student_folder(model), *([Path(model.teacher)] if model.teacher else [])]:
        try:
            families.append(family_of(folder))
            readable.append(folder)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        if families == [None]:  # the other folder is no MobileVLM; say at once what is wrong with this one
            _read(readable[0], model.vision_tower if readable[0] == student_folder(model) else None, problems)
        return problems
    if families == [None] * len(families):
        return _mobilevlm_problems(model, top_k)
    if len(set(families)) > 1:
        names = [family.model_type if family else "mobilevlm" for family in families]
        return [f"teacher and student are of different families: {names[1]} and {names[0]}"]
    assert families[0] is not None, "two MobileVLMs have been compared"
    return processor_files.chat_problems(model, student_folder(model), families[0])


def _mobilevlm_problems(model: ModelSection, top_k: int) -> list[str]:
    """The same for two MobileVLMs.

    Both models see the same ids and pixels, so the tokenizer file, the vocabulary size, the number of vision
    tokens of an image (whose placeholder id is the same in the whole family) and the preprocessing are
    compared.
    """
    problems: list[str] = []
    student, student_tokenizer = _read(student_folder(model), model.vision_tower, problems)
    if model.teacher is None:
        return problems
    teacher, teacher_tokenizer = _read(Path(model.teacher), None, problems)
    if student is None or teacher is None or problems:
        return problems
    if teacher_tokenizer != student_tokenizer:
        problems.append("teacher and student have different tokenizers (tokenizer.model differs)")
    if teacher.vocab_size != student.vocab_size:
        problems.append(
            f"vocabulary sizes differ: teacher {teacher.vocab_size}, student {student.vocab_size}"
        )
    if teacher.vision_tokens != student.vision_tokens:
        problems.append(
            f"vision tokens per image differ: teacher {teacher.vision_tokens}, "
            f"student {student.vision_tokens}"
        )
    for key in PIXEL_KEYS:
        ours, theirs = student.preprocessor_config.get(key), teacher.preprocessor_config.get(key)
        if ours != theirs:
            problems.append(f"image preprocessing differs in `{key}`: teacher {theirs}, student {ours}")
    if top_k > student.vision_tokens:
        problems.append(
            f"distillation.top_k is {top_k}, but an image has {student.vision_tokens} vision tokens; "
            f"valid: 1 to {student.vision_tokens}"
        )
    return problems


def has_other_grids(model: ModelSection) -> bool:
    """Whether the teacher's vision tokens are resampled to the student's grid. Raises CheckpointError."""
    student = student_folder(model)
    family = family_of(student)
    if model.teacher is None or family is None:
        return False
    return processor_files.has_other_grids(family, Path(model.teacher), student)


def grid_notes(model: ModelSection) -> list[str]:
    """What to know of a pair that agrees, but sees images on different grids."""
    try:
        if not has_other_grids(model):
            return []
    except CheckpointError:  # an earlier stage may have yet to write it
        return []
    return [
        f"{model.teacher}: its processor makes other grids of vision tokens than the student's, to which "
        "they are resampled; data.max_length and token budgets count the student's tokens (docs/models.md)"
    ]


def untried_notes(model: ModelSection) -> list[str]:
    """What to know of models whose family is not in the table. Folders that cannot be read are left out."""
    notes = []
    for folder in {student_folder(model), *([Path(model.teacher)] if model.teacher else [])}:
        try:
            family = family_of(folder)
        except CheckpointError:
            continue
        if family is not None and not family.tried:
            notes.append(
                f"{folder}: {family.model_type} is untried; when the run starts, it is compared with "
                "transformers on one sample, and refused if it differs (docs/models.md)"
            )
    return sorted(notes)


def check_templates(config: Config) -> list[str]:
    """Sources whose template the models do not have, settings that only MobileVLM knows, and packages."""
    family = family_of(student_folder(config.model))
    problems = template_problems(config.model, config.data.sources)
    problems += template_problems(config.model, config.evaluation.sources, "evaluation")
    for key, source in config.named_sources().items():
        if family is None and source.image_options:
            problems.append(f"{key}.image_options: MobileVLM's preprocessing has none")
        elif source.image_options and config.distillation.enabled and has_other_grids(config.model):
            problems.append(
                f"{key}.image_options: they would go to both processors, which make "
                "different grids of vision tokens; valid: none"
            )
    if family is not None and config.training.packing:
        problems += _packing_problems(config)
    if config.student.lora is not None and importlib.util.find_spec("peft") is None:
        problems.append("student.lora needs the package peft: pip install 'alignkd[lora]'")
    return problems


def _packing_problems(config: Config) -> list[str]:
    model = config.model
    folders = [student_folder(model)]
    if model.teacher is not None and config.distillation.enabled:
        folders.append(Path(model.teacher))
    problems = []
    for folder in folders:
        family = family_of(folder)
        problem = None if family is None else packing_problem(folder, family)
        if problem is not None:
            problems.append(f"training.packing = true: {problem}; valid: false")
    return sorted(set(problems))


def template_problems(model: ModelSection, sources: Sequence[DataSource], section: str = "data") -> list[str]:
    """Sources of a section whose template the models do not have."""
    family = family_of(student_folder(model))
    problems = []
    for number, source in enumerate(sources):
        valid = ("plain", "v1") if family is None else ("chat",)
        if source.template not in valid:
            key = f"{section}.sources[{number}].template = {source.template}"
            problems.append(f"{key}: valid for these models: {', '.join(valid)}")
    return problems


def _read(
    folder: Path, vision_tower: str | None, problems: list[str]
) -> tuple[MobileVLMConfig | None, str | None]:
    """(configuration, hash of the tokenizer). What cannot be read is None; ``problems`` says why."""
    config = tokenizer = None
    try:
        config = read_model_config(folder, vision_tower)
    except CheckpointError as error:
        problems.append(str(error))
    try:
        tokenizer = tokenizer_hash(folder)
    except CheckpointError as error:
        problems.append(str(error))
    return config, tokenizer
