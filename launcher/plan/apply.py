"""Writes values into a configuration file, keeping comments, order and quotes.

The result is read back and compared before it replaces the file; the old text is kept beside it.
"""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.util import load_yaml_guess_indent

from alignkd.config.dotted import Keys, get_value, join_keys, set_value, split_key
from alignkd.config.yaml_reader import dump_scalar, parse_yaml, read_yaml
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_text_atomic

BACKUP_SUFFIX = ".bak"


def apply_changes(path: Path, stage: str | None, values: Mapping[str, Any]) -> list[str]:
    """Set dotted keys, in the section of ``stage`` if there is one; returns lines that say what was changed.

    Raises UserError, with the lines to change by hand, when the file cannot be edited.
    """
    document = read_yaml(path)
    prefix = ("stages", stage) if stage else ()
    wanted = {(*prefix, *split_key(key)): value for key, value in values.items()}
    wanted = {keys: value for keys, value in wanted.items() if not _is_set(document, keys, value)}
    if not wanted:
        return [f"{path}: already set, nothing was written"]
    old = path.read_bytes().decode("utf-8")  # line endings as they are
    if not all(set_value(document, keys, value) for keys, value in wanted.items()) or (
        parse_yaml(new := edited(old, wanted)) != document
    ):
        lines = "\n".join(f"{key}: {dump_scalar(value)}" for key, value in values.items())
        where = f" below stages.{stage}" if stage else ""
        raise UserError(f"{path}: cannot be edited without losing something; change by hand{where}\n{lines}")
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    target = path.resolve()  # a symbolic link stays one
    mode = stat.S_IMODE(target.stat().st_mode)
    write_text_atomic(backup, old, mode=mode)
    write_text_atomic(target, new, mode=mode)
    changed = [f"  {join_keys(keys)}: {dump_scalar(value)}" for keys, value in wanted.items()]
    return [f"{path}: changed (the old file is {backup})", *changed]


def edited(text: str, changes: Mapping[Keys, Any]) -> str:
    """``text`` with these values set; missing sections are created."""
    yaml = YAML(typ="rt")
    yaml.preserve_quotes, yaml.width = True, len(text) + 100  # no line is wrapped
    yaml.representer.add_representer(type(None), _represent_null)
    document, indent, offset = load_yaml_guess_indent(text.replace("\r\n", "\n"), yaml=yaml)
    nested = re.search(r"^( +)[^\s#-]", text, re.MULTILINE)
    yaml.indent(len(nested[1]) if nested else 2, *((2, 0) if offset is None else (indent, offset)))
    for keys, value in changes.items():
        _set(document, keys, value)
    out = io.StringIO()
    yaml.dump(document, out)
    return out.getvalue().replace("\n", "\r\n") if "\r\n" in text else out.getvalue()


def _set(document: Any, keys: Keys, value: Any) -> None:
    *parents, last = keys
    for key in parents:
        if get_value(document, (key,)) is None:
            _put(document, key, CommentedMap())
        document = document[key]
    _put(document, last, value)


def _put(section: Any, key: str | int, value: Any) -> None:
    """A new key becomes the first of its section: after the last one, it would follow the blank lines and
    comments that belong to the next section."""
    if isinstance(section, CommentedMap) and key not in section:
        section.insert(0, key, value)
    else:
        section[key] = value


def _represent_null(representer: Any, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _is_set(document: Any, keys: Keys, value: Any) -> bool:
    found = get_value(document, keys)
    return bool(found == value and type(found) is type(value))
