"""Reading and writing YAML safely, with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``12:30:00`` a number in base 60, ``no`` is false and
``2026-01-02`` a date. All four bite in a file with learning rates, time limits and names, so this reader
knows the scalars of YAML 1.2's core schema only. The dumper shares them: what it writes reads back equal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from alignkd.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_RESOLVERS = {
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "tag:yaml.org,2002:int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
}


class YamlError(UserError):
    """Text that is not the plain YAML that we read, with its line."""


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags, no aliases (they can expand without end), no duplicate keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise YamlError(f"{_line(event.start_mark)}: aliases (`*{event.anchor}`) are not read")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            raise YamlError(f"{_line(event.start_mark)}: tags (`{event.tag}`) are not read")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(f"{_line(event.start_mark)}: nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f"{_line(key_node.start_mark)}: a key must be a word")
            key = key_node.value
            if key in mapping:
                raise YamlError(
                    f"{_line(key_node.start_mark)}: duplicate key `{key}` (first on {lines[key]})"
                )
            lines[key] = _line(key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_yaml_int(self, node: Any) -> int:
        text = node.value
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError as error:  # more digits than Python converts
            raise YamlError(f"{_line(node.start_mark)}: not a usable number: {text[:20]}...") from error


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def parse_yaml(text: str | bytes) -> Any:
    """Plain data of one YAML document; raises YamlError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        where = f"{_line(error.problem_mark)}: " if error.problem_mark else ""
        raise YamlError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlError("not valid YAML: not readable as UTF-8 text without control characters") from error


def read_yaml(path: Path) -> Any:
    """Plain data of the file ``path``; raises UserError when it cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: no such file; `alignkd init --preset sample` writes one to start from")
    if not path.is_file():
        raise UserError(f"{path}: not a file; name the YAML file of the run")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes: this is no configuration")
    try:
        return parse_yaml(content)
    except YamlError as error:
        raise YamlError(f"{path}: {error}") from error


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, keys in their order; ``parse_yaml`` reads it back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
