"""What env.sh does to the ranks that the local back end starts; bash sources it."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import UserError
from launcher.backends.local import run_local
from launcher.backends.run_environment import run_environment
from launcher.render.job_scripts import render_scripts
from launcher.run.attempts import read_history

RECORD = "import json, os; print(json.dumps(dict(os.environ)))"


def put(run: Path, text: str) -> None:
    (run / "env.sh").write_text(text)


def test_modules_activation_and_variables_of_a_site_reach_the_ranks(make_run, make_config, tmp_path) -> None:
    run, manifest = make_run()
    activation = tmp_path / "it's activate"
    activation.write_text("echo loaded $LOADED; export PATH=/activated:$PATH\nexport TWO_LINES=$'a\\nb'\n")
    slurm = {
        "modules": ["cuda/12"],
        "activate": f". '{tmp_path}/it'\\''s activate'",
        "export": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "77"},
        "gpu_option": "none",
    }
    scripts = render_scripts(make_config(f"slurm={json.dumps(slurm)}"), run, 1, 2)
    put(run, 'module() { export LOADED="$*"; }\n' + scripts["env.sh"])
    code = run_local(run, manifest, Console(file=io.StringIO()), [sys.executable, "-c", RECORD])
    assert code == 0
    for rank in range(2):
        values = json.loads((run / "logs" / f"rank-{rank}.log").read_text().splitlines()[-1])
        assert values["LOADED"] == "load cuda/12"
        assert values["TWO_LINES"] == "a\nb"
        assert (values["NCCL_DEBUG"], values["PATH"].partition(":")[0]) == ("INFO", "/activated")
        assert (values["RANK"], values["OMP_NUM_THREADS"] != "77") == (str(rank), True)  # the launcher's


def test_the_interpreter_is_that_of_env_sh(make_run, tmp_path: Path) -> None:
    run, manifest = make_run()
    python = tmp_path / "bin" / "my-python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho $* >>{tmp_path}/started\n")
    python.chmod(0o755)
    put(run, f"export PYTHON=my-python PATH={python.parent}:$PATH\n")
    assert run_local(run, manifest, Console(file=io.StringIO())) == 0
    assert (tmp_path / "started").read_text() == f"-m alignkd.train {run}\n" * 2


def test_without_env_sh_the_ranks_get_the_environment_of_the_launcher(make_run) -> None:
    run, _ = make_run()
    assert run_environment(run, {"A": "b"}) == {"A": "b", "PYTHON": sys.executable}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 3\n", "env.sh: ended with exit code 3; see slurm.modules and slurm.activate"),
        ("return 3\n", "env.sh: ended with exit code 3"),
        ("set -e\nfalse\necho not reached\n", "env.sh: ended with exit code 1"),
        ("if true; then\n", r"env.sh: ended with exit code [12]"),
        ("exit 0\n", "env.sh: ended with exit code 0"),
        ("trap 'echo bye' EXIT\nexit 0\n", "env.sh: ended with exit code 0"),
        ("export PYTHON=/gone/python\n", "env.sh: PYTHON=/gone/python is not on this machine"),
    ],
)
def test_an_env_sh_that_cannot_be_used_is_an_error_before_an_attempt(
    make_run, text: str, message: str
) -> None:
    run, manifest = make_run()
    put(run, text)
    with pytest.raises(UserError, match=message):
        run_local(run, manifest, Console(file=io.StringIO()))
    assert read_history(run) == []
    assert not (run / "attempt.json").exists()


def test_what_env_sh_prints_and_reads_is_the_users_own(make_run, capfd) -> None:
    """A warning about a missing secret, say; a question would wait for ever."""
    run, _ = make_run()
    put(run, "echo to stdout; echo to stderr >&2; read -r answer; export ANSWER=[$answer]\n")
    values = run_environment(run, os.environ)
    assert (values["ANSWER"], values["PYTHON"]) == ("[]", sys.executable)
    assert capfd.readouterr() == ("", "to stdout\nto stderr\n")
