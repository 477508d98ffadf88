"""Turns a YAML file, a stage and overrides into one validated ``Config``, reporting all problems at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from alignkd.config.combinations import combination_problems
from alignkd.config.dotted import did_you_mean, set_value, split_key
from alignkd.config.migrate import migrate
from alignkd.config.problems import schema_problems
from alignkd.config.schema import Config
from alignkd.config.section import Section
from alignkd.config.yaml_reader import YamlError, dump_yaml, parse_yaml, read_yaml
from alignkd.errors import ConfigError

# Values of these keys are paths, except for the word `scratch`.
PATH_KEYS = {
    ("model", "teacher"),
    ("model", "student"),
    ("model", "student_config"),
    ("model", "vision_tower"),
    ("model", "adapters"),
    ("teacher", "cache"),
    ("data", "sources", "file"),
    ("data", "sources", "image_folder"),
    ("evaluation", "sources", "file"),
    ("evaluation", "sources", "image_folder"),
    ("evaluation", "task_data"),
    ("run", "folder"),
}
NOT_PATHS = {"", "scratch"}


def load_config(
    path: Path | str,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Read, merge and validate a configuration.

    ``defaults`` (a site profile) is a document without paths that the file overrides. ``overrides`` are
    ``a.b=value`` with a YAML scalar or list as the value; they take precedence over the stage, which takes
    precedence over the file. Relative paths in the file are relative to its folder, those in an override to
    the current folder. Raises ConfigError with every problem, UserError when the file cannot be read.
    """
    path = Path(path)
    return _resolve(path, read_yaml(path), overrides, stage, defaults)


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a run folder, which an older version may have written."""
    document = read_yaml(path)
    return _resolve(path, migrate(document) if isinstance(document, dict) else document, overrides)


def _resolve(
    path: Path,
    document: Any,
    overrides: Sequence[str],
    stage: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(str(path), ["the file must be a mapping of sections (`model: ...`, `data: ...`)"])
    folder = Path(os.path.abspath(path)).parent
    document = _resolve_paths(document, (), folder)
    if isinstance(document.get("run", {}), dict):  # the default is relative to the file, too
        document.setdefault("run", {}).setdefault("folder", str(folder / "runs"))
    problems: list[str] = []
    stages = document.pop("stages", None) or {}
    if not isinstance(stages, dict) or not all(isinstance(keys or {}, dict) for keys in stages.values()):
        problems.append(
            "stages: must be a section of sections (`stages: {pretrain: {...}, finetune: {...}}`)"
        )
        stages = {}
    document = _merge(defaults or {}, document)
    stages = {name: _resolve_paths(keys or {}, (), folder) for name, keys in stages.items()}
    problems += _stage_problems(stages, stage)
    merged = {name: _merge(document, keys) for name, keys in stages.items()} or {"": document}
    if stage in merged:
        problems += _override(merged[stage], overrides)
    elif not stages:
        problems += _override(merged[""], overrides)

    problems += schema_problems(merged, stages)
    chosen = merged.get(stage or "")
    if chosen is not None:
        valid = _valid_sections(chosen)
        problems += combination_problems(valid)
        if not problems:
            return Config(**valid)  # type: ignore[arg-type]
    raise ConfigError(str(path), problems)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML; reading it back gives an equal ``Config``."""
    return dump_yaml(config.model_dump(exclude={"stages"}))


def _resolve_paths(value: Any, keys: tuple[str, ...], folder: Path) -> Any:
    """A copy of ``value``, which stands at ``keys``, with absolute paths."""
    if isinstance(value, dict):
        return {key: _resolve_paths(item, (*keys, key), folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(item, keys, folder) for item in value]
    if isinstance(value, str) and keys in PATH_KEYS and value not in NOT_PATHS:
        return os.path.normpath(folder / os.path.expanduser(value))
    return value


def _stage_problems(stages: Mapping[str, Any], stage: str | None) -> list[str]:
    names = ", ".join(stages)
    problems = [
        f"stages.{name}.stages: a stage cannot contain stages" for name in stages if "stages" in stages[name]
    ]
    if stage is None and stages:
        problems.append(f"this file has stages but none was chosen; valid: --stage with one of: {names}")
    elif stage is not None and not stages:
        problems.append(f"--stage {stage}: this file has no stages; omit --stage")
    elif stage is not None and stage not in stages:
        problems.append(f"--stage {stage}: no such stage; valid: {names}{did_you_mean(stage, stages)}")
    return problems


def _merge(base: Any, over: Any) -> Any:
    """``base`` overridden by ``over``: sections are merged key by key, anything else is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {
            **base,
            **{
                key: _merge(base[key], value) if key in base else value
                for key, value in over.items()
                if key != "stages"
            },
        }
    return over


def _override(document: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write each ``a.b=value`` into ``document``; returns the problems."""
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = split_key(name.strip())
        if not equals or "" in keys:
            problems.append(f"--set {override}: expected key=value, such as training.learning_rate=2e-5")
            continue
        if keys[0] == "stages":
            problems.append(
                f"--set {override}: write the key without `stages.NAME`; it applies to the chosen stage"
            )
            continue
        try:
            value = parse_yaml(text)
        except YamlError as error:
            problems.append(f"--set {override}: {error}")
            continue
        words = tuple(key for key in keys if isinstance(key, str))
        if not set_value(document, keys, _resolve_paths(value, words, Path.cwd())):
            problems.append(f"--set {override}: no section or list there can hold this key")
    return problems


def _valid_sections(document: Mapping[str, Any]) -> dict[str, Section]:
    """The sections that are valid on their own, without unknown ones and those with problems."""
    valid = {}
    for name, field in Config.model_fields.items():
        if name == "stages":
            continue
        if name not in document and not field.is_required():
            valid[name] = field.get_default(call_default_factory=True)
            continue
        annotation: Any = field.annotation
        try:
            valid[name] = TypeAdapter[Section](annotation).validate_python(document.get(name))
        except ValidationError:
            continue
    return valid
