"""What the contents of a cache depend on, by name, so that a stale one is refused with the reason.

Contents are hashed and paths are not: models, data and caches may move. Launch and ranks compute the same key
from the same files. Without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkd.config.schema import Config
from alignkd.data.image_paths import BadImage, resolve_below
from alignkd.data.json_list import JsonListFile
from alignkd.errors import UserError, raise_if_passing
from alignkd.models.agreement import student_folder, tokenizer_hash
from alignkd.models.configuration import read_model_config

WEIGHTS = ("*.safetensors", "*.bin")
MEANINGS = {  # what a user calls the parts of the key
    "teacher": "the teacher's weights or configuration",
    "records": "the records, or the settings that remove some (data.max_length, data.max_image_pixels, "
    "data.on_bad_sample)",
    "images": "the contents of the images",
    "template": "the templates of the records (template, image_aspect_ratio)",
    "tokenizer": "the tokenizer",
    "positions": "the positions (distillation.logit_positions)",
    "precision": "the precision (teacher.precision, or training.precision)",
    "form": "the form of the teacher's answers (teacher.cache_form; for top_k also teacher.cache_top_k "
    "and distillation.temperature)",
}
PLAIN = ("positions", "precision", "form")  # no hashes: the values are shown


def precision_of(config: Config) -> str:
    """The teacher's, which is that of its hidden states."""
    return config.teacher.precision or config.training.precision


def top_k_of(config: Config) -> int | None:
    """How many tokens the cache stores of a position, where it stores tokens."""
    return config.teacher.cache_top_k if config.teacher.cache_form == "top_k" else None


def _form(config: Config) -> str:
    """The form, and after a comma what its contents depend on."""
    form, top_k = config.teacher.cache_form, top_k_of(config)
    return form if top_k is None else f"{form}, {top_k} at temperature {config.distillation.temperature}"


def cache_key(config: Config, images: Sequence[tuple[int, str]], has_student: bool = True) -> dict[str, str]:
    """A value for each of :data:`MEANINGS`, but no tokenizer without ``has_student``: an earlier stage may
    have yet to write it. ``images``: (source, path) of those that stand for all.

    Reads the teacher's weights, the records and these images. Raises UserError.
    """
    data = config.data
    assert config.model.teacher is not None, "checked by the configuration"
    records = {
        "files": [JsonListFile(source.file).sha256() for source in data.sources],
        "max_length": data.max_length,
        "max_image_pixels": data.max_image_pixels,
        "on_bad_sample": data.on_bad_sample,
    }
    template = [[source.template, source.image_aspect_ratio] for source in data.sources]
    key = {
        "teacher": _teacher_hash(Path(config.model.teacher)),
        "records": _hash(records),
        "images": _images_hash(config, images),
        "template": _hash(template),
        "positions": config.distillation.logit_positions,
        "precision": precision_of(config),
        "form": _form(config),
    }
    return key | ({"tokenizer": tokenizer_hash(student_folder(config.model))} if has_student else {})


def differences(cached: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """A line for each part of the wanted key that differs."""
    lines = []
    for name, meaning in MEANINGS.items():
        ours, theirs = wanted.get(name), cached.get(name)
        if ours is None:
            continue
        if ours != theirs:
            values = f": {theirs} in the cache, {ours} in the run" if name in PLAIN else ""
            lines.append(f"{name}: {meaning}{values}")
    return lines


def _teacher_hash(folder: Path) -> str:
    facts = read_model_config(folder)
    described = [facts.raw, facts.tower_config, facts.preprocessor_config]
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    return _hash([described, [[path.name, _file_hash(path)] for path in files]])


def _images_hash(config: Config, images: Sequence[tuple[int, str]]) -> str:
    return _hash(list(_image_hashes(config, images)))


def _image_hashes(config: Config, images: Sequence[tuple[int, str]]) -> Iterator[str | None]:
    """None of an image that is missing or not readable: it fails where it is read, or is skipped there. Paths
    come from records, or from a manifest, and are not trusted."""
    sources = config.data.sources
    for source, name in images:
        folder = str(sources[source].image_folder if source < len(sources) else None)
        try:
            yield _content_hash(resolve_below(folder, name))
        except BadImage:
            yield None
        except OSError as error:
            raise_if_passing(error, name)
            yield None


def _file_hash(path: Path) -> str:
    try:
        return _content_hash(path)
    except OSError as error:
        raise_if_passing(error, path)
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
