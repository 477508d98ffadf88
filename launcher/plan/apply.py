"""Write advised values into a configuration file, and leave every other character of it alone.

PyYAML tells where each value stands, so only those spans are replaced; comments and order survive. The result
is read back and compared before it takes the file's place; the old text stays beside it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkd.config.dotted import Keys, get_value, join_keys, set_value, split_key
from alignkd.config.yaml_reader import YamlError, dump_yaml, parse_yaml, read_yaml
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_text_atomic

BACKUP_SUFFIX = ".bak"


def apply_changes(path: Path, stage: str | None, values: Mapping[str, Any]) -> list[str]:
    """Set dotted keys, those of a stage in that stage; returns what was done, line by line.

    Raises UserError, with the lines to change by hand, when the file cannot be edited that way.
    """
    document = read_yaml(path)
    prefix = ("stages", stage) if stage else ()
    wanted = {(*prefix, *split_key(key)): value for key, value in values.items()}
    wanted = {keys: value for keys, value in wanted.items() if not _is_set(document, keys, value)}
    if not wanted:
        return [f"{path}: already so, nothing was written"]
    old = new = path.read_bytes().decode("utf-8")  # its line ends stay
    editable = True
    for keys, value in wanted.items():
        new = set_scalar(new, keys, value)
        editable = editable and set_value(document, keys, value)
    if not editable or not _reads_as(new, document):
        lines = "\n".join(f"{key}: {_scalar(value)}" for key, value in values.items())
        where = f" below stages.{stage}" if stage else ""
        raise UserError(f"{path}: cannot be edited without losing something; change by hand{where}\n{lines}")
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    place = path.resolve()  # a link stays one
    mode = stat.S_IMODE(place.stat().st_mode)
    write_text_atomic(backup, old, mode=mode)
    write_text_atomic(place, new, mode=mode)
    changed = [f"  {join_keys(keys)}: {_scalar(value)}" for keys, value in wanted.items()]
    return [f"{path}: changed (the old file is {backup})", *changed]


def set_scalar(text: str, keys: Keys, value: Any) -> str:
    """``text`` with ``value`` at ``keys``; sections that are missing are made."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    depth = 0
    while depth < len(keys):
        found = _child(node, keys[depth])
        if found is None or not isinstance(found, yaml.MappingNode):
            break
        node, depth = found, depth + 1
    if depth == len(keys) - 1 and (scalar := _child(node, keys[depth])) is not None:
        return text[: scalar.start_mark.index] + _scalar(value) + text[scalar.end_mark.index :]
    return _inserted(text, node, keys[depth:], value)


def _inserted(text: str, node: Any, keys: Keys, value: Any) -> str:
    """A new first entry of the mapping ``node``."""
    if not isinstance(node, yaml.MappingNode) or not node.value:
        return text  # an empty section: the comparison refuses, and the user is told
    start = node.value[0][0].start_mark
    if node.flow_style:
        inner = _scalar(value)
        for key in reversed(keys[1:]):
            inner = f"{{{key}: {inner}}}"
        return f"{text[: start.index]}{keys[0]}: {inner}, {text[start.index :]}"
    lines = [f"{'  ' * level}{key}:" for level, key in enumerate(keys)]
    lines[-1] += f" {_scalar(value)}"
    indent = " " * start.column
    entry = f"\n{indent}".join(lines)
    return f"{text[: start.index]}{entry}\n{indent}{text[start.index :]}"


def _child(node: Any, key: str | int) -> Any:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == key:
                return value_node
    return None


def _is_set(document: Any, keys: Keys, value: Any) -> bool:
    found = get_value(document, keys)
    return bool(found == value and type(found) is type(value))


def _reads_as(text: str, document: Any) -> bool:
    try:
        return bool(parse_yaml(text) == document)
    except YamlError:
        return False


def _scalar(value: Any) -> str:
    return dump_yaml(value).removesuffix("...\n").strip()
