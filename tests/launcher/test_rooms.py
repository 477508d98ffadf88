"""The rooms of the launcher: imports only go down, back ends are named in one place, nothing needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the lowest floor up; rooms of one floor do not import each other.
FLOORS = ({"run", "render"}, {"plan", "report"}, {"backends"}, {"commands"}, {"cli"})
BACKENDS = {"local", "slurm", "ssh"}
LIGHT = (
    "launcher",
    "alignkd/run_folder",
    "alignkd/config",
    "alignkd/teacher_cache",
)  # what a login node imports


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_module_of_the_launcher_is_in_a_known_room() -> None:
    flat = [path.name for path in (ROOT / "launcher").glob("*.py")]
    assert flat == ["__init__.py"]
    rooms = {path.relative_to(ROOT / "launcher").parts[0] for path in modules("launcher")} - set(flat)
    assert rooms == set().union(*FLOORS)


def test_no_room_imports_a_higher_one() -> None:
    climbs = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("launcher")
        if (room := path.relative_to(ROOT / "launcher").parts[0]) != "__init__.py"
        for name in imported(path)
        if name.startswith("launcher.")
        and (other := name.split(".")[1]) != room
        and floor(other) >= floor(room)
    ]
    assert climbs == []


def test_alignkd_never_imports_the_launcher() -> None:
    found = [
        path for path in modules("alignkd") for name in imported(path) if name.split(".")[0] == "launcher"
    ]
    assert found == []


def compared(path: Path) -> Iterator[object]:
    """Constants that a file compares with, in tuples too, but not arguments of calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        operands += [node.value] if isinstance(node, ast.MatchValue) else []
        for operand in operands:
            elements = operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
            yield from (element.value for element in elements if isinstance(element, ast.Constant))


def test_back_ends_are_compared_by_name_in_one_place_only() -> None:
    """Others ask the Backend. A new back end must not need a search for its name."""
    found = {str(path.relative_to(ROOT)) for path in modules("launcher") if BACKENDS & set(compared(path))}
    # The site profile has a section `slurm`, which is not the back end.
    assert found == {"launcher/backends/__init__.py", "launcher/run/site.py"}


def test_only_commands_that_need_slurm_itself_import_it() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in modules("launcher")
        if "backends" not in path.parts
        for name in imported(path)
        if name.startswith("launcher.backends.slurm")
    }
    assert importing == {
        f"launcher/commands/{name}.py"
        for name in ("cache_job", "cache_request", "drill", "evaluate_job", "follow_up")
    }


def test_no_module_is_longer_than_250_lines() -> None:
    long = {path.name: n for path in modules("launcher") if (n := len(path.read_text().splitlines())) > 250}
    assert long == {}


@pytest.mark.parametrize("folder", LIGHT)
def test_no_import_brings_torch_along(folder: str) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules(folder)
        if path.name != "__main__.py"
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
