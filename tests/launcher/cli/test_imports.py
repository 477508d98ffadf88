"""Commands import what they need when they run: waiting for help or for a status would be annoying."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.cli.command import HEAVY, ROOT, alignkd

LIBRARIES = HEAVY | {"jinja2", "pydantic", "rich", "ruamel.yaml", "yaml"}
ROOMS = {"alignkd.config", "launcher.plan", "launcher.render", "launcher.run"}
BY_TYPER = {"pydantic"}  # which needs it as soon as it parses arguments


def test_help_imports_neither_libraries_nor_commands() -> None:
    done = alignkd("--help")
    assert done.returncode == 0
    assert "typer" in done.imported
    assert done.imported & (LIBRARIES | ROOMS) == set()


@pytest.mark.parametrize("command", ["launch", "plan", "status", "resume", "ckpt", "report"])
def test_help_of_a_command_imports_no_command(command: str) -> None:
    done = alignkd(command, "--help")
    assert done.returncode == 0
    assert done.imported & (LIBRARIES | ROOMS) <= BY_TYPER


def test_status_reads_a_run_without_its_configuration(make_run) -> None:
    run, _ = make_run()
    done = alignkd("status", run)
    assert f"run    {run}\n" in done.stdout
    assert "launcher.commands.status" in done.imported
    assert done.imported & (LIBRARIES | ROOMS) <= BY_TYPER | {"launcher.run"}


@pytest.mark.parametrize("backend", ["local", "ssh", "slurm"])
def test_reading_the_state_of_a_run_imports_no_library(make_run, backend: str) -> None:
    run: Path = make_run(backend=backend)[0]
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from launcher.cli.tables import show_state\n"
        "from launcher.commands.status import current_state\n"
        f"show_state(current_state(Path({str(run)!r})))\n"
        f"print(*({LIBRARIES!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "state" in done.stdout
    assert done.stderr.strip() == ""
