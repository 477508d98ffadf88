"""The ``alignkd`` command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "deepspeed", "numpy"}
_MARK = "imported: "
_PROGRAM = (
    "import atexit, sys\n"
    f"atexit.register(lambda: print({_MARK!r} + ' '.join(sys.modules), file=sys.stderr))\n"
    "from launcher.cli.app import main\n"
    "main()\n"
)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str
    imported: frozenset[str]  # modules, by their full names

    @property
    def is_light(self) -> bool:
        return not self.imported & HEAVY


def alignkd(*arguments: object, cwd: Path = ROOT, columns: int = 80) -> Done:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    stderr, mark, modules = done.stderr.rpartition(_MARK)
    assert mark, done.stderr
    return Done(done.returncode, done.stdout, stderr, frozenset(modules.split()))
