"""Describes the keys of the schema in words, and finds the valid key nearest to an unknown one."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alignkd.config.dotted import join_keys
from alignkd.config.schema import Config
from alignkd.config.section import Section

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a section",
}
_LIMITS = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "more than"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "less than"),
)


@dataclass(frozen=True)
class Key:
    """One key of the schema: its dotted name and a description of its valid values."""

    name: str
    valid: str


def number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value < 1e6 else str(value)


def _unpack(annotation: Any) -> tuple[Any, list[Any], bool]:
    """(type, constraints, nullable) of an annotation such as ``Annotated[float, Gt(0)] | None``."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        kind, more, nullable = _unpack(inner)
        return kind, [*metadata, *more], nullable
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        kind, metadata, _ = _unpack(options[0])
        return kind, metadata, len(options) < len(get_args(annotation))
    return annotation, [], False


def _flatten(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from _flatten(item.metadata) if isinstance(item, FieldInfo) else [item]


def describe(field: FieldInfo) -> str:
    """The valid values of a key: ``a number, more than 0 (default 4e-05; what it is for)``."""
    kind, inner, nullable = _unpack(field.annotation)
    metadata = list(_flatten([*field.metadata, *inner]))
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    elif get_origin(kind) is list:
        (member,) = get_args(kind)
        words = "a list" if _element(field.annotation) is None else "a list of sections"
        if get_origin(member) is Literal:
            words = "a list of " + ", ".join(str(choice) for choice in get_args(member))
    elif get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Section)):
        words = "a section"
    else:
        words = _TYPE_NAMES.get(kind, "text")
    limits = [
        f"{text} {number(getattr(item, attribute))}"
        for cls, attribute, text in _LIMITS
        for item in metadata
        if isinstance(item, cls)
    ]
    if kind in (int, float) and limits:
        words = ", ".join([words, *limits])
    if nullable:
        words += " or null"
    notes = []
    simple = field.default is not PydanticUndefined and not isinstance(field.default, Section)
    if simple and field.default is not None:
        default = field.default
        notes.append(f"default {str(default).lower() if isinstance(default, bool) else number(default)}")
    if field.description:
        notes.append(field.description)
    return f"{words} ({'; '.join(notes)})" if notes else words


def _element(annotation: Any) -> type[Section] | None:
    """The section class of an annotation that is a section or a list of sections; None for any other."""
    kind, _, _ = _unpack(annotation)
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def find_field(keys: tuple[str | int, ...]) -> FieldInfo | None:
    """The schema's field at a location such as ("data", "sources", 0, "file"); None if there is none."""
    section: type[Section] | None = Config
    field = None
    for key in keys:
        if isinstance(key, int):
            continue
        if section is None or key not in section.model_fields:
            return None
        field = section.model_fields[key]
        section = _element(field.annotation)
    return field


def all_keys(section: type[Section] = Config, prefix: str = "") -> list[Key]:
    """Every key of the schema, sections included; members of a list are written ``data.sources[].file``."""
    keys = []
    for name, field in section.model_fields.items():
        dotted = prefix + name
        keys.append(Key(dotted, describe(field)))
        inner = _element(field.annotation)
        if inner is not None:
            listed = get_origin(_unpack(field.annotation)[0]) is list
            keys += all_keys(inner, dotted + ("[]." if listed else "."))
    return keys


def nearest(keys: tuple[str | int, ...]) -> list[Key]:
    """Up to three valid keys that the user may have meant by an unknown one, best first.

    The same name in another section is preferred, then a similar name in this section, then one elsewhere.
    """
    word = str(keys[-1])
    here = _section_name(keys)
    known = [key for key in all_keys() if key.name != "stages"]
    same = [key for key in known if _last(key) == word]
    if same:
        return same[:3]
    siblings = [key for key in known if _parent(key) == here]
    for pool in (siblings, known):
        close = difflib.get_close_matches(word, {_last(key) for key in pool}, n=1, cutoff=0.7)
        if close:
            return [key for key in pool if _last(key) == close[0]][:3]
    return []


def siblings(keys: tuple[str | int, ...]) -> list[str]:
    """The valid names in the section of an unknown key."""
    here = _section_name(keys)
    return [_last(key) for key in all_keys() if _parent(key) == here]


def _last(key: Key) -> str:
    return key.name.rpartition(".")[2]


def _parent(key: Key) -> str:
    return key.name.rpartition(".")[0]


def _section_name(keys: tuple[str | int, ...]) -> str:
    """``data.sources[]`` for ("data", "sources", 0, "file"), as in ``all_keys``."""
    return re.sub(r"\[\d+\]", "[]", join_keys(keys[:-1]))
