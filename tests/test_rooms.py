"""Imports between the rooms of ``alignkd`` flow one way."""

from __future__ import annotations

import ast
from pathlib import Path

import alignkd

PACKAGE = Path(alignkd.__file__).parent
PROGRAMS = {"train", "probe", "cache_teacher"}  # modules beside the rooms


def imported_rooms(room: str) -> set[str]:
    """Rooms of alignkd that the modules of a room import, at any place in their code."""
    path = PACKAGE / room
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    names = [
        node.module.split(".")
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    ]
    return {name[1] for name in names if name[0] == "alignkd" and len(name) > 1} - {room}


def test_only_programs_import_the_engine() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {room for room in rooms if "engine" in imported_rooms(room)} == PROGRAMS


def test_ranks_know_nothing_of_training() -> None:
    assert imported_rooms("distributed") == {"errors"}
