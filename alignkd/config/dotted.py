"""Dotted keys such as ``training.micro_batch_size``, and the nested data that they name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

Keys = tuple[str | int, ...]  # an int is a position in a list


def split_key(key: str) -> Keys:
    """``data.sources.0.file`` -> ("data", "sources", 0, "file")."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def join_keys(keys: Keys) -> str:
    """``data.sources[0].file``, as messages write it."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def get_value(document: Any, keys: Keys, default: Any = None) -> Any:
    """The value at ``keys``, or ``default`` where there is none."""
    for key in keys:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return default
    return document


def set_value(document: Any, keys: Keys, value: Any) -> bool:
    """Write ``value`` at ``keys``, creating missing sections; False when nothing there can hold the key."""
    *parents, last = keys
    for key in parents:
        if isinstance(document, dict) and isinstance(key, str) and document.get(key) is None:
            document[key] = {}
        document = get_value(document, (key,))
    if isinstance(document, dict):
        fits = isinstance(last, str)
    else:
        fits = isinstance(document, list) and isinstance(last, int) and last < len(document)
    if fits:
        document[last] = value
    return fits


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested mappings; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """``; did you mean X?`` for the valid word that is closest to ``word``; empty when none is close."""
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {close[0]}?" if close else ""
