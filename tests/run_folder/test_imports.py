"""The login node reads run folders: what it imports for that must be there, and quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from alignkd import run_folder

FOLDER = Path(run_folder.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
HEAVY = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "rich", "typer")


def test_the_room_needs_no_heavy_package() -> None:
    assert len(MODULES) >= 10
    modules = ", ".join(f"alignkd.run_folder.{name}" for name in MODULES)
    code = f"import sys, {modules}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_its_own_room_errors_and_configuration_only(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported
    for module in imported:
        first = module.split(".")[0]
        if first == "alignkd":
            assert module.startswith(("alignkd.run_folder", "alignkd.errors", "alignkd.config"))
        else:
            assert first in sys.stdlib_module_names
