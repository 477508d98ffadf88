"""The configuration keys in which runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkd.config.dotted import flatten

MISSING = "(not set)"


@dataclass(frozen=True)
class Key:
    name: str
    values: tuple[str, ...]  # of each run

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def keys_of(configs: Sequence[Mapping[str, Any]]) -> list[Key]:
    """All keys of all runs, those that differ first."""
    flat = [flatten(config) for config in configs]
    names = dict.fromkeys(name for values in flat for name in values)
    keys = [Key(name, tuple(_shown(values, name) for values in flat)) for name in names]
    return sorted(keys, key=lambda key: not key.differs)


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return MISSING
    value = values[name]
    return value if isinstance(value, str) else json.dumps(value, default=str)
