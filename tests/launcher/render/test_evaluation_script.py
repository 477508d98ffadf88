"""The scripts of an evaluation job: the golden files, and the verdict of bash and shellcheck.

tests/slurm/test_evaluation.py runs them on a real Slurm.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from alignkd.config.slurm_section import SlurmSection
from launcher.render.job_scripts import render_evaluation
from tests.launcher.render.test_job_scripts import EVERYTHING, GOLDEN, SETTINGS, directives, shellcheck


@pytest.fixture
def render(monkeypatch):
    """Scripts for fixed paths of the folder and of the interpreter."""

    def make(settings, out="/runs/eval"):
        monkeypatch.setattr("sys.executable", "/venv/bin/python")
        monkeypatch.setattr("launcher.render.job_scripts._CHECKOUT", Path("/checkout"))
        return render_evaluation(SlurmSection.model_validate(settings), "eval-eval", Path(out), 2, 4)

    return make


def test_the_scripts_equal_the_golden_files(render) -> None:
    """To accept a change, run `ALIGNKD_WRITE_GOLDEN=1 pytest THIS_FILE` and read the diff."""
    for script, text in render({}).items():
        path = GOLDEN / "evaluation" / script
        if os.environ.get("ALIGNKD_WRITE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs"


def test_settings_become_directives_and_no_signal_comes_before_the_time_limit(render) -> None:
    values = directives(render(EVERYTHING)["job.sbatch"])
    assert (values["job-name"], values["account"], values["gres"]) == ("eval-eval", "a #b", "gpu:a100:4")
    assert (values["nodes"], values["ntasks-per-node"]) == ("2", "4")
    assert (values["time"], values["licenses"]) == ("1-00:00:00", "scratch")
    assert "no-requeue" in values
    assert "signal" not in values  # it would end the ranks


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_answer_on_the_device_that_was_asked_for(render, name: str) -> None:
    scripts = render(SETTINGS[name])
    assert ("DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}" in scripts["job.sbatch"]) == (name != "cpu")
    assert ("DS_ACCELERATOR=cpu" in scripts["env.sh"]) == (name == "cpu")
    called = set(re.findall(r"-m (\S+)", scripts["job.sbatch"]))
    assert called == {"alignkd.evaluate"}
    assert importlib.util.find_spec("alignkd.evaluate.__main__") is not None


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("out", ["/runs/eval", '/a $(touch x)/it\'s "q" \\ `b`/eval'])
def test_bash_and_shellcheck_accept_the_scripts(render, tmp_path, name: str, out: str) -> None:
    program = shellcheck()
    for script, text in render(SETTINGS[name], out).items():
        path = tmp_path / script
        path.write_text(text)
        parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (parsed.returncode, parsed.stderr) == (0, "")
        # SC2016: what looks like an expansion is a folder name, and must not be expanded.
        done = subprocess.run([program, "--exclude=SC2016", path], capture_output=True, text=True)
        assert done.stdout == ""


@pytest.mark.parametrize("out", ["/runs/eval", '/a $(touch x)/it\'s "q" \\ `b`/eval'])
def test_bash_reads_the_folder_as_it_is(render, out: str) -> None:
    line = next(line for line in render({}, out)["job.sbatch"].splitlines() if "export OUT=" in line)
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$OUT"'], capture_output=True, text=True)
    assert done.stdout == out
