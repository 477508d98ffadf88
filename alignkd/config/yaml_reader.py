"""Reading and writing YAML 1.2 safely: plain data only, no aliases or tags, no duplicate keys, text as keys.

ruamel.yaml reads ``1e-4`` as a number, and ``no`` and ``12:30:00`` as text. PyYAML follows YAML 1.1 and does
the opposite, which is wrong for learning rates, names and time limits.
"""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
)
from ruamel.yaml.representer import SafeRepresenter

from alignkd.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


class YamlError(UserError):
    """Text that is not plain YAML; the message has the line."""


class _Constructor(SafeConstructor):
    """Leaves dates as text: a run may be named after one."""


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that occurs twice is written twice


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = False, 100, True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def parse_yaml(text: str | bytes) -> Any:
    """The data of one YAML document; raises YamlError."""
    return copy.deepcopy(_parsed(text))


@functools.lru_cache(maxsize=8)
def _parsed(text: str | bytes) -> Any:
    """Remembered, because the start of a run reads its configuration several times, at 0.05 s each."""
    try:
        _check_events(text)
        data = _yaml().load(text)
    except MarkedYAMLError as error:
        where = f"{_line(error.problem_mark)}: " if error.problem_mark else ""
        raise YamlError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise YamlError("not valid YAML: not readable as UTF-8 text without control characters") from error
    except ValueError as error:  # more digits than Python converts
        raise YamlError(f"not valid YAML: {error}") from error
    _check_keys(data)
    return data


def _check_events(text: str | bytes) -> None:
    """Refuse aliases, which can expand exponentially, tags, another version of YAML, and deep nesting, before
    anything is built."""
    depth = 0
    for event in _yaml().parse(text):
        if isinstance(event, AliasEvent):
            raise YamlError(f"{_line(event.start_mark)}: aliases (`*{event.anchor}`) are not supported")
        tag = getattr(event, "tag", None)
        if isinstance(event, NodeEvent) and tag is not None:
            raise YamlError(f"{_line(event.start_mark)}: the tag '{tag}' is not supported")
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise YamlError(f"{_line(event.start_mark)}: directives (`%`) are not supported")
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"{_line(event.start_mark)}: nested more than {MAX_DEPTH} levels deep")


def _check_keys(data: Any) -> None:
    if isinstance(data, dict):
        for key in data:
            if not isinstance(key, str):
                raise YamlError(f"the key `{key}` is not text; put it in quotes")
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _check_keys(value)


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def read_yaml(path: Path) -> Any:
    """The data of a YAML file; raises UserError when it cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: no such file; `alignkd init --preset sample` writes one to start from")
    if not path.is_file():
        raise UserError(f"{path}: not a file; pass the YAML file of the run")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes: this is not a configuration")
    try:
        return parse_yaml(content)
    except YamlError as error:
        raise YamlError(f"{path}: {error}") from error


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, with keys in their order; ``parse_yaml`` reads it back equal."""
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()


def dump_scalar(value: Any) -> str:
    """One value as a YAML file would write it."""
    return dump_yaml(value).removesuffix("...\n").strip()
