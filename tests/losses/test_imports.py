"""The losses stand alone: they import torch, the standard library and one another."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from alignkd import losses
from alignkd.data import batch
from alignkd.losses import logits

FOLDER = Path(losses.__file__).parent
ALLOWED = {"torch", *sys.stdlib_module_names}


def imports_of(path: Path) -> set[str]:
    """Whole names of all modules that the file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_losses_import_only_torch_and_one_another(path: Path) -> None:
    strangers = {
        name
        for name in imports_of(path)
        if name.split(".")[0] not in ALLOWED and not name.startswith("alignkd.losses.")
    }
    assert strangers == set()


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "models").rglob("*.py")), ids=lambda path: path.name)
def test_models_know_nothing_of_losses(path: Path) -> None:
    assert not any(name.startswith("alignkd.losses") for name in imports_of(path))


def test_every_equation_has_its_module() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")}
    assert {"attention", "vision", "logits", "fused_logits", "total"} <= modules


def test_data_and_losses_ignore_the_same_label() -> None:
    assert logits.IGNORE_INDEX == batch.IGNORE_INDEX
