"""The environment of the ranks as a run's env.sh makes it, for ranks that this process starts itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths

# What env.sh prints is for the user; `env` is found before `activate` may change PATH.
# Not `source ... ||`, which would switch off a `set -e` in it.
_PRINT = 'program=$(type -P env); source "$0" >&2; set -- $?; (($1 == 0)) || exit $1; "$program" -0'


def run_environment(run: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``base``, changed as env.sh says: modules, `activate`, exported variables, and whatever its user wrote.

    PYTHON is the interpreter of the ranks. Raises UserError when env.sh fails or ends the shell, or its
    interpreter is not on this machine.
    """
    script = RunPaths(run).environment_script
    if not script.exists():
        return {**base, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", _PRINT, str(script)], env=base, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    if done.returncode != 0 or b"\0" not in done.stdout:  # no variable: the shell ended before `env`
        raise UserError(
            f"{script}: ended with exit code {done.returncode}; see slurm.modules and slurm.activate"
        )
    pairs = (os.fsdecode(entry).partition("=") for entry in done.stdout.split(b"\0") if entry)
    values = {name: value for name, _, value in pairs}
    python = values.setdefault("PYTHON", sys.executable)
    if shutil.which(python, path=values.get("PATH")) is None:
        raise UserError(f"{script}: PYTHON={python} is not on this machine; correct it there (slurm.python)")
    return values
