"""What the command line answers: exit codes, hints, JSON, narrow and colourless terminals."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from alignkd.config.presets import preset_text
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.cli.app import app
from launcher.commands.states import State, exit_code_of
from launcher.run.attempts import Reason, begin, close
from launcher.run.lock import only_launcher

MANUAL = Path(__file__).parents[3] / "docs" / "json.md"


def alignkd(*words: object, **variables: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env=variables)


def ended(run: Path, reason: Reason, codes: dict[int, int] | None = None) -> Path:
    close(run, begin(run, "local", "here", None), reason, codes=codes or {})
    return run


def test_a_fresh_folder_has_no_runs_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("status", "list"):
        done = alignkd(command)
        assert done.exit_code == 0
        assert done.stdout == f"no runs yet in {tmp_path}/runs; start one with: alignkd launch\n"
        assert alignkd(command, "--json").stdout == "[]\n"
    assert "no such folder" in alignkd("list", "elsewhere").stderr


def test_status_of_a_folder_of_runs_lists_them(make_run) -> None:
    run, _ = make_run()
    assert alignkd("status", run.parent).stdout == alignkd("list", run.parent).stdout
    assert f"\n{run.name} " in alignkd("status", run.parent).stdout
    assert alignkd("status", run.parent, "--exit-code").exit_code == 2
    no_run = alignkd("status", RunPaths(run).logs.parent / "ds")
    assert no_run.exit_code == 2
    assert "not a run folder" in no_run.stderr


def test_a_dry_run_can_be_repeated_until_the_run_is_started_or_edited(
    config_file: Path, tmp_path: Path
) -> None:
    arguments = ("launch", config_file, "--backend", "local", "--dry-run")
    assert alignkd(*arguments).exit_code == 0
    again = alignkd(*arguments, "--set", "training.learning_rate=1e-4")
    assert again.exit_code == 0
    run = tmp_path / "runs" / "run"
    assert "learning_rate: 0.0001" in RunPaths(run).config.read_text()
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    later = RunPaths(run).manifest.stat().st_mtime + 5
    os.utime(RunPaths(run).environment_script, (later, later))
    edited = alignkd(*arguments)
    assert edited.exit_code == 2
    assert "edited since: env.sh; start it (`alignkd resume" in edited.stderr
    os.utime(RunPaths(run).environment_script, (0, 0))
    with only_launcher(run):
        pass
    started = alignkd(*arguments)
    assert started.exit_code == 2
    assert "never overwritten" in started.stderr


def test_a_plan_that_does_not_fit_exits_with_1(config_file: Path) -> None:
    small = alignkd("plan", config_file, "--gpu-memory", "1M")
    assert small.exit_code == 1
    assert "does not fit into 1.0 MiB" in small.stdout
    assert "0.00 GiB." not in small.stdout
    assert alignkd("plan", config_file, "--gpu-memory", "80G").exit_code == 0
    assert alignkd("plan", config_file).exit_code == 0
    assert alignkd("plan", config_file, "--gpu-memory", "1M", "--json").exit_code == 1


def test_a_plan_without_models_names_all_of_them_by_key(config_file: Path) -> None:
    missing = ("--set", "model.teacher=/no/teacher", "--set", "model.student=/no/student")
    done = alignkd("plan", config_file, *missing)
    assert done.exit_code == 2
    for key in ("teacher", "student"):
        assert f"model.{key} = /no/{key}: /no/{key}/config.json: no such file" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "/nowhere"),
        ("logs", "/nowhere"),
        ("plan", "/nowhere"),
        ("launch", "/nowhere", "--backend", "local"),
        ("resume", "/nowhere"),
        ("wait", "/nowhere"),
        ("stop", "/nowhere"),
        ("ckpt", "list", "/nowhere"),
        ("explain", "/nowhere"),
        ("launch", "--no-such-option"),
        ("logs",),
    ],
)
def test_every_failure_is_json_when_json_was_asked_for(arguments: tuple[str, ...]) -> None:
    done = alignkd(*arguments, "--json")
    values = json.loads(done.stdout)
    assert values.keys() == {"error", "code"}
    assert values["code"] == done.exit_code == 2
    assert done.stderr.startswith("alignkd: error: ")  # people read it, too
    assert values["error"].splitlines()[0] == done.stderr.splitlines()[0].removeprefix("alignkd: error: ")
    assert alignkd(*arguments).stdout == ""


def test_the_manual_names_every_state_and_its_exit_code() -> None:
    lines = MANUAL.read_text().splitlines()
    for state in State:
        assert any(line.startswith(f"| `{state}` | {exit_code_of(state)} |") for line in lines), state


def test_the_manual_has_every_field_of_a_state(make_run) -> None:
    manual = MANUAL.read_text()
    state = json.loads(alignkd("status", make_run()[0], "--json").stdout)
    assert [key for key in state if f"| `{key}` |" not in manual] == []
    assert state["state"] in list(State)


@pytest.mark.parametrize(
    ("reason", "codes", "code"),
    [
        (Reason.STOPPED, {0: 85}, 85),
        (Reason.CANCELLED, {0: 86}, 86),
        (Reason.CRASHED, {0: 1}, 1),
        (Reason.LOST, {}, 1),
    ],
)
def test_the_exit_code_of_a_state_is_asked_for(
    make_run, reason: Reason, codes: dict[int, int], code: int
) -> None:
    run = ended(make_run()[0], reason, codes)
    assert alignkd("status", run).exit_code == 0
    assert alignkd("status", run, "--exit-code").exit_code == code
    assert alignkd("wait", run).exit_code == code


def test_a_run_that_has_not_ended_exits_with_3(make_run) -> None:
    run = make_run()[0]
    assert alignkd("status", run, "--exit-code").exit_code == 3
    assert alignkd("wait", run).exit_code == 3  # nothing will start it
    with only_launcher(run):
        assert alignkd("status", run, "--exit-code").exit_code == 3


def test_wait_returns_when_the_run_has_ended(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.commands.wait.POLL_SECONDS", 0.02)
    run = make_run()[0]
    held = threading.Event()

    def train() -> None:
        with only_launcher(run):
            held.set()
            time.sleep(0.5)
            write_json(RunPaths(run).result, {"status": "done"})

    trainer = threading.Thread(target=train)
    started = time.monotonic()
    trainer.start()
    held.wait()
    done = alignkd("wait", run, "--json")
    trainer.join()
    assert time.monotonic() - started >= 0.5
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (0, "done")


def test_a_hostfile_alone_implies_ssh(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=2\ntwo slots=2\n")
    done = alignkd("launch", config_file, "--hostfile", tmp_path / "hosts", "--dry-run")
    assert done.exit_code == 0, done.stderr
    # What it would run is what the back end runs, not a rank on this machine.
    script = tmp_path / "runs" / "run" / "rank.sh"
    assert f"  ssh one bash {script}\n  ssh two bash {script}\n" in done.stdout
    assert "alignkd.train" not in done.stdout
    local = alignkd("launch", config_file, "--hostfile", tmp_path / "hosts", "--backend", "local")
    assert "--hostfile is only for the ssh back end" in local.stderr


def test_an_option_that_begins_like_a_known_one_is_recognised() -> None:
    done = alignkd("launch", "--gpu", "4")
    assert done.exit_code == 2
    assert "--gpu: no such option; did you mean --gpus-per-node or --gpu-memory?" in done.stderr
    assert "did you mean --dry-run?" in alignkd("launch", "--dryrun").stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--teacher", "x"),
        ("--template", "v1"),
        ("--image-folder", "x"),
        ("--image-aspect-ratio", "pad"),
        ("--adapters", "x"),
        ("--dtype", "float32"),
        ("--seed", "0"),
    ],
    ids=" ".join,
)
def test_a_probe_of_a_run_refuses_what_the_run_settles(tmp_path: Path, option: tuple[str, str]) -> None:
    """Also where the value is the default."""
    done = alignkd("probe", "--run", tmp_path, *option)
    assert done.exit_code == 2
    assert "valid beside it: --samples, --json" in done.stderr


def test_a_bad_name_blames_the_option_that_was_typed(config_file: Path) -> None:
    done = alignkd("launch", config_file, "--backend", "local", "--name", "../x")
    assert done.exit_code == 2
    assert "--name ../x: not valid; valid: " in done.stderr
    assert "run.name" not in done.stderr


def test_a_typo_in_the_site_profile_names_the_nearest_key(config_file: Path, tmp_path: Path) -> None:
    site = tmp_path / "alignkd" / "site.yaml"
    site.parent.mkdir()
    site.write_text("slurm: {partion: x}\n")
    arguments = ("launch", config_file, "--backend", "local")
    done = alignkd(*arguments, XDG_CONFIG_HOME=str(tmp_path))
    assert done.exit_code == 2
    assert "slurm.partion: unknown key; did you mean partition?" in done.stderr
    site.write_text("slurm: {zzz: x}\n")
    assert (
        "slurm.zzz: unknown key; valid: account, "
        in alignkd(*arguments, XDG_CONFIG_HOME=str(tmp_path)).stderr
    )


def test_names_of_runs_stay_on_40_columns(make_run) -> None:
    run: Path = ended(make_run()[0], Reason.STOPPED)
    names = ["distil-7b-to-1.7b-a", "distil-7b-to-1.7b-b"]
    for name in names:
        (run.parent / name).mkdir()
        RunPaths(run.parent / name).manifest.write_text(RunPaths(run).manifest.read_text())
    shown = alignkd("list", run.parent, COLUMNS="40").stdout
    assert all(name in shown for name in [*names, run.name])
    assert shown.splitlines()[0].split()[:2] == ["run", "state"]
    assert max(map(len, shown.splitlines())) <= 40
    assert "goodput" in alignkd("list", run.parent, COLUMNS="80").stdout


def test_no_color_leaves_no_escape_codes(make_run) -> None:
    run = make_run()[0]
    terminal = {"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1", "TERM": "xterm"}
    assert "\x1b[1m" in alignkd("list", run.parent, **terminal, NO_COLOR="").stdout  # bold
    assert "\x1b" not in alignkd("list", run.parent, **terminal, NO_COLOR="1").stdout


def test_help_names_arguments_as_messages_do() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        text = alignkd(name, "--help").stdout
        assert "{" not in text, name
        assert " range>" not in text, name
        assert "<path>" not in text, name
        assert text.startswith(f"Usage: alignkd {name} "), command
    assert "Usage: alignkd logs [OPTIONS] RUN\n" in alignkd("logs", "--help").stdout
    assert "\n  RUN         Run folder." in alignkd("logs", "--help").stdout


@pytest.mark.parametrize("words", [("nope",), ("logs",), ("launch", "--nodes", "x"), ("status", "/nowhere")])
def test_every_error_has_one_prefix(words: tuple[str, ...]) -> None:
    done = alignkd(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith("alignkd: error: ")
    assert "Error:" not in done.stderr
    assert "Usage:" not in done.stderr


def test_the_sample_preset_says_that_it_trains_on_cpus() -> None:
    assert "gpu_option: none" in preset_text("sample")
