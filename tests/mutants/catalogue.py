"""The kept list of mutants: small, deliberate mistakes in the product, each with the tests that must notice.

One YAML file per room, a list of entries:

| key | holds |
|---|---|
| breaks | what the mutant does wrong, in one line |
| file | the file that it changes, from the root of the repository |
| old, new | the text that is replaced, which the file has exactly once, and its replacement |
| tests | one test or more, as pytest names them |
| survives | only where no test can notice: why |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str | None = None

    def problem(self, root: Path) -> str | None:
        """Why it cannot be applied to the tree at ``root``; None when it can."""
        if self.old == self.new:
            return "it changes nothing"
        found = (root / self.file).read_text(encoding="utf-8").count(self.old)
        return None if found == 1 else f"{self.file} has its old text {found} times instead of once"

    def apply(self, root: Path) -> str:
        """Change the tree at ``root``; returns the file's text as it was."""
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace(self.old, self.new), encoding="utf-8")
        return before


def read_mutants(folder: Path = Path(__file__).parent) -> list[Mutant]:
    """All entries of the YAML files in ``folder``. Raises TypeError for an entry with an unknown key."""
    return [
        _mutant(entry)
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def _mutant(entry: dict[str, Any]) -> Mutant:
    tests = entry.pop("tests")
    return Mutant(**entry, tests=(tests,) if isinstance(tests, str) else tuple(tests))
