import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignkd.config.yaml_reader import dump_yaml
from alignkd.errors import AlignkdError, UserError
from launcher.run_folder import run_path
from launcher.slurm import file_pattern, render_scripts, sbatch_word, shell_word, slurm_answers, submit

NASTY = ["with space", "quo'te", 'dou"ble', "do$llar", "back`tick", "ha#sh", "per%cent", "semi;colon", "*"]


def parse_directive(line: str) -> str:
    """One option of an #SBATCH line as sbatch reads it: quotes, backslashes, a bare # is a comment."""
    text, quote, index = "", None, 0
    while index < len(line):
        char = line[index]
        if char == "\\":
            index += 1
            text += line[index]
        elif quote:
            quote, text = (None, text) if char == quote else (quote, text + char)
        elif char in "'\"":
            quote = char
        elif char == "#" or char.isspace():
            break
        else:
            text += char
        index += 1
    return text


@pytest.mark.parametrize("value", [*NASTY, "back\\slash", "a\\\"b'#c"])
def test_words_survive_their_quoting(value: str) -> None:
    assert parse_directive(f"--x={sbatch_word(value)}") == f"--x={value}"
    shown = subprocess.run(["bash", "-c", f"printf %s {shell_word(value)}"], capture_output=True, text=True)
    assert shown.stdout == value


@pytest.mark.parametrize("value", ["a\nb", "a\0b", "a\rb", "\x1b[31m"])
def test_control_characters_are_refused(value: str) -> None:
    for quote in (sbatch_word, shell_word):
        with pytest.raises(UserError, match="control character"):
            quote(value)


def test_file_patterns_take_the_folder_literally() -> None:
    assert file_pattern(Path("/a%j/b"), "x-%t.log") == "/a%%j/b/x-%t.log"
    with pytest.raises(UserError, match="backslash"):
        file_pattern(Path("/a\\b"), "x")


def directives(script: str) -> dict[str, str]:
    lines = [parse_directive(line[8:]) for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def test_directives(make_config, tmp_path) -> None:
    config = make_config(
        "slurm={account: 'a #b', partition: gpu, time_limit: '1-00:00:00', cpus_per_task: 6}",
        "slurm.constraint=x&y",
    )
    run = run_path(config)
    values = directives(render_scripts(config, run, 2, 4)["job.sbatch"])
    assert values["account"] == "a #b"
    assert values["constraint"] == "x&y"
    assert values["time"] == "1-00:00:00"
    assert (values["nodes"], values["ntasks-per-node"], values["gpus-per-node"]) == ("2", "4", "4")
    assert values["cpus-per-task"] == "6"
    assert values["signal"] == "USR1@300"
    assert values["open-mode"] == "append"
    assert values["output"] == f"{run}/logs/slurm-%j.log"
    assert "qos" not in values


def fake_programs(folder: Path, srun_exit: int = 0) -> Path:
    """srun and scontrol that behave like the real ones for two nodes of two tasks each, without Slurm."""
    folder.mkdir()
    (folder / "scontrol").write_text('#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "n1\\nn2\\n"\n')
    (folder / "srun").write_text(
        "#!/bin/bash\n"
        f'printf "%s\\n" "$@" > "{folder}/srun.args"\n'
        'for word in "$@"; do [ "${word#--}" = "$word" ] && program=$word && break; done\n'
        "for id in 0 1 2 3; do\n"
        "  SLURM_PROCID=$id SLURM_LOCALID=$((id % 2)) SLURM_NODEID=$((id / 2)) SLURM_NTASKS=4 "
        '"$program" || exit\n'
        f"done\nexit {srun_exit}\n"
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


@pytest.mark.parametrize("name", ["plain", *NASTY])
def test_the_scripts_run_from_any_folder(make_config, tmp_path, name: str, monkeypatch) -> None:
    """Executed with bash and pretend Slurm programs: every rank gets its environment and the run's path."""
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\necho "$RANK $LOCAL_RANK $NODE_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE '
        f'$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS|$*" >> {shell_word(str(tmp_path / "out"))}\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    config = make_config(f"run.folder={dump_yaml(str(tmp_path / name))}", "slurm.cpus_per_task=3")
    run = run_path(config)
    run.mkdir()
    for script, text in render_scripts(config, run, 2, 2).items():
        (run / script).write_text(text)
        (run / script).chmod(0o755)
    fakes = fake_programs(tmp_path / "bin")
    environment = {
        "PATH": f"{fakes}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "3",
    }
    done = subprocess.run(["bash", run / "job.sbatch"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.split()[:6] for line in lines] == [
        ["0", "0", "0", "4", "2", "n1"],
        ["1", "1", "0", "4", "2", "n1"],
        ["2", "0", "1", "4", "2", "n1"],
        ["3", "1", "1", "4", "2", "n1"],
    ]
    for line in lines:
        port, threads = line.partition("|")[0].split()[6:]
        assert 20000 <= int(port) < 32768
        assert threads == "3"
        assert line.partition("|")[2] == f"-m alignkd.train {run}"
    arguments = (fakes / "srun.args").read_text().splitlines()
    assert {"--kill-on-bad-exit=1", "--mpi=none", "--export=ALL", "--cpus-per-task=3", "--ntasks=4"} <= {
        *arguments
    }
    assert f"--output={str(run).replace('%', '%%')}/logs/rank-%t.log" in arguments


def test_the_exit_code_of_srun_arrives(make_config, tmp_path) -> None:
    config = make_config()
    script = tmp_path / "job"
    script.write_text(
        render_scripts(config, run_path(config), 1, 1)["job.sbatch"].replace("rank.sh", "missing")
    )
    fakes = fake_programs(tmp_path / "bin")
    environment = {"PATH": f"{fakes}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    assert subprocess.run(["bash", script], env=environment, capture_output=True).returncode == 127


@pytest.mark.parametrize("name", ["job.sbatch", "rank.sh"])
def test_shellcheck(make_config, tmp_path, name: str) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    script = tmp_path / name
    config = make_config()
    script.write_text(render_scripts(config, run_path(config), 2, 2)[name])
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.stdout == ""


def put_program(folder: Path, name: str, body: str, monkeypatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_submit(tmp_path, monkeypatch) -> None:
    put_program(tmp_path / "bin", "sbatch", 'echo "42;cluster"', monkeypatch)
    assert submit(tmp_path) == "42"
    put_program(tmp_path / "bin", "sbatch", "echo Invalid account >&2; exit 1", monkeypatch)
    with pytest.raises(AlignkdError, match="Invalid account"):
        submit(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--backend local"):
        submit(tmp_path)


def test_slurm_answers_only_when_a_controller_is_up(tmp_path, monkeypatch) -> None:
    put_program(tmp_path / "bin", "sbatch", "true", monkeypatch)
    put_program(tmp_path / "bin", "scontrol", 'echo "Slurmctld(primary) at x is UP"', monkeypatch)
    assert slurm_answers()
    put_program(tmp_path / "bin", "scontrol", 'echo "Slurmctld(primary) at x is DOWN"', monkeypatch)
    assert not slurm_answers()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not slurm_answers()
