"""Stand-ins for the programs of Slurm."""

from pathlib import Path

import pytest


def put_program(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of this name, first on PATH, with a body in bash."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
