"""Describes what the schema refuses: the key, its value, what would be valid, and the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alignkd.config.describe import describe, find_field, nearest, siblings
from alignkd.config.dotted import Keys, get_value, join_keys
from alignkd.config.migrate import REMOVED, RENAMED
from alignkd.config.schema import Config
from alignkd.config.yaml_reader import dump_scalar

MISSING = object()


def schema_problems(merged: Mapping[str, Any], stages: Mapping[str, Any]) -> list[str]:
    """What the schema refuses in the file and in each of its stages, each problem once."""
    stages_of: dict[str, list[str]] = {}
    for name, document in merged.items():
        try:
            Config.model_validate(document)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                in_stage = name in stages and get_value(stages[name], details["loc"], MISSING) is not MISSING
                prefix = f"stages.{name}." if in_stage else ""
                stages_of.setdefault(prefix + _text(details), []).append(name)
    return [
        # A key may be missing in some stages only.
        text
        if len(names) == len(merged) or text.startswith("stages.")
        else f"{text} [stage {', '.join(names)}]"
        for text, names in stages_of.items()
    ]


def _text(details: ErrorDetails) -> str:
    """One problem: key, value, what would be valid, and for an unknown key the nearest one."""
    keys: Keys = details["loc"]
    name = join_keys(keys)
    if details["type"] == "extra_forbidden":
        if name in RENAMED:
            return f"{name} = {_shown(details['input'])}: has been renamed; valid: {RENAMED[name]}"
        if name in REMOVED:
            return f"{name} = {_shown(details['input'])}: has been removed; delete this key"
        close = nearest(keys)
        if close:
            meant = " or ".join(f"{key.name}: {key.valid}" for key in close)
            return f"{name} = {_shown(details['input'])}: unknown key; did you mean {meant}"
        return f"{name} = {_shown(details['input'])}: unknown key; valid here: {', '.join(siblings(keys))}"
    field = find_field(keys)
    valid = describe(field) if field is not None else details["msg"]
    if isinstance(keys[-1], int) and details["type"] != "literal_error":
        valid = "a section"
    if details["type"] == "missing":
        return f"{name} is missing; valid: {valid}"
    return f"{name} = {_shown(details['input'])}: not valid; valid: {valid}"


def _shown(value: Any) -> str:
    """A value as a file would write it, shortened."""
    if isinstance(value, dict | list):
        text = "{...}" if isinstance(value, dict) else "[...]"
        return text if value else str(value)
    text = dump_scalar(value)
    return text if len(text) <= 80 else text[:77] + "..."
