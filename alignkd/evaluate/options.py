"""What an evaluation does, in a file that all of its processes read. Without torch.

``OUT/evaluation.json`` holds the options; ``python -m alignkd.evaluate OUT`` is one rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from alignkd.errors import UserError, raise_if_passing
from alignkd.evaluate.files import read_json
from alignkd.evaluate.gguf_limits import refuse_choices, require_llama_cpp
from alignkd.evaluate.model_folders import FolderKind, folder_kind
from alignkd.evaluate.tasks.own import own_task
from alignkd.evaluate.tasks.registry import OWN, tasks_named
from alignkd.evaluate.tasks.task import Task
from alignkd.run_folder.atomic_files import write_text_atomic
from alignkd.run_folder.paths import RunPaths

OPTIONS_FILE = "evaluation.json"
BATCH_SIZE = 16
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class ModelChoice:
    name: str  # in tables, in answers, and of the folder of its answers
    folder: str


@dataclass(frozen=True)
class OwnQuestions:
    """The files of the task ``own``."""

    questions: str  # below the folder of the data
    image_folder: str | None = None  # None: the questions' own
    metric: str = "exact"


@dataclass(frozen=True)
class EvalOptions:
    models: tuple[ModelChoice, ...]
    tasks: str  # "gqa,pope"
    data: str
    out: str
    own: OwnQuestions | None = None
    step: int | None = None  # of the models, which must be runs then
    precision: str | None = None  # None: bf16 on a GPU, fp32 on a CPU
    batch_size: int = BATCH_SIZE
    limit: int | None = None  # ask only the first questions of each task
    image_padding: Literal["pad", "crop"] | None = None  # None: as each task has it
    as_json: bool = False
    categories: bool = False  # print a table per category

    def chosen_tasks(self) -> list[Task]:
        return chosen_tasks(self.tasks, Path(self.data), self.own)

    def check(self, *, in_this_python: bool = True) -> None:
        """Raises UserError for what can be known to be wrong before a model is loaded. ``in_this_python``: do
        the ranks run in it, so that what it lacks they lack?"""
        for model in self.models:
            folder = Path(model.folder)
            if folder_kind(folder, self.step) is FolderKind.GGUF:
                refuse_choices(folder, precision=self.precision, image_padding=self.image_padding)
                if in_this_python:
                    require_llama_cpp(folder)
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("--batch-size and --limit must be at least 1")
        if self.precision not in (None, *PRECISIONS):
            raise UserError(f"--precision {self.precision}: valid: {', '.join(PRECISIONS)}")


def chosen_tasks(names: str, data: Path, own: OwnQuestions | None) -> list[Task]:
    """Raises UserError for an unknown task."""
    if (own is None) != (names != OWN):
        raise UserError("--task own (alone) and --questions FILE go together")
    if own is None:
        return tasks_named(names)
    folder = None if own.image_folder is None else Path(own.image_folder)
    return [own_task(data, own.questions, folder, own.metric)]


def model_name(folder: Path) -> str:
    """Name of a model folder that is given none: its own, or that of the run for ``RUN/student``."""
    path = folder.resolve()
    is_export = path == RunPaths(path.parent).student and RunPaths(path.parent).config.is_file()
    return path.parent.name if is_export else path.name


def named_models(models: Sequence[str]) -> tuple[ModelChoice, ...]:
    """``NAME=FOLDER``, or a folder, named by ``model_name``. Raises UserError for two models of one name."""
    found: dict[str, ModelChoice] = {}
    for given in models:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).is_dir():
            folder = given
            name = model_name(Path(given))
        if not name or name.startswith(".") or "/" in name or not folder:
            raise UserError(f"model {given!r:.200}: must be a folder, or NAME=FOLDER")
        if name in found:
            raise UserError(
                f"models {found[name].folder} and {folder} are both called {name}; name one: NAME={folder}"
            )
        found[name] = ModelChoice(name, folder)
    return tuple(found.values())


def write_options(options: EvalOptions) -> None:
    path = Path(options.out) / OPTIONS_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(asdict(options), indent=1) + "\n")
    except OSError as error:
        raise_if_passing(error, path)
        raise UserError(f"{path}: cannot be written ({error})") from None


def read_options(out: Path) -> EvalOptions:
    """Raises UserError when the folder has no options, or those of another version."""
    path = out / OPTIONS_FILE
    found: Any = read_json(path)
    try:
        unknown = set(found) - {field.name for field in fields(EvalOptions)}
        if unknown:
            raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
        models = tuple(ModelChoice(**model) for model in found.pop("models"))
        own = found.pop("own")
        return EvalOptions(models, own=None if own is None else OwnQuestions(**own), **found)
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not the options of an evaluation ({error})") from None


def answers_file(options: EvalOptions, model: str, task: str) -> Path:
    """Where the answers of all ranks come together."""
    first = "" if options.limit is None else f".first-{options.limit}"
    return Path(options.out) / model / f"{task}{first}.jsonl"
