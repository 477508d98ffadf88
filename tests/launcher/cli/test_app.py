import json

import pytest

from alignkd.config.presets import PRESETS
from tests.launcher.cli.command import ROOT, alignkd

RUNS = ("status", "wait", "logs", "stop", "cancel", "list", "ckpt", "explain", "drill")


def test_every_command_is_listed_and_its_help_fits_80_columns() -> None:
    done = alignkd("--help")
    assert done.returncode == 0
    assert done.is_light
    for command in (
        "init",
        "plan",
        "cache",
        "launch",
        "resume",
        "eval",
        "report",
        "chat",
        "probe",
        "sample-data",
        "export",
        *RUNS,
    ):
        assert f"\n  {command} " in done.stdout
        help_text = alignkd(command, "--help")
        assert help_text.returncode == 0
        assert help_text.is_light
        assert max(map(len, help_text.stdout.splitlines())) <= 80
    for text in (done.stdout, alignkd("ckpt", "--help").stdout):
        lines = text.partition("Commands:")[2]
        assert lines
        assert "..." not in lines  # each is whole on a terminal of 80 columns
    options = alignkd("launch", "--help").stdout
    for name in ("--nodes", "--gpus-per-node", "--backend", "--name", "--stage", "--set", "--dry-run"):
        assert name in options
    presets = alignkd("init", "--help").stdout
    assert all(name in presets for name in PRESETS)
    assert alignkd("--version").stdout.startswith("alignkd ")


def test_a_file_system_error_is_one_message_without_a_traceback() -> None:
    for arguments in (("plan", "x" * 300), ("ckpt", "list", "x" * 300), ("status", "x" * 300)):
        done = alignkd(*arguments)
        assert done.returncode == 2
        assert "File name too long" in done.stderr or "not a run folder" in done.stderr
        assert "Traceback" not in done.stderr


def test_init_writes_a_preset_and_replaces_a_file_only_with_force(tmp_path) -> None:
    done = alignkd("init", "--preset", "sample", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "wrote alignkd.yaml; its first lines say how to start\n")
    assert done.is_light
    assert "stages:" in (tmp_path / "alignkd.yaml").read_text()
    again = alignkd("init", "--preset", "sample", cwd=tmp_path)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert alignkd("init", "--preset", "sample", "--force", cwd=tmp_path).returncode == 0


def test_a_dry_run_writes_the_run_folder_and_starts_nothing(config_file, tmp_path) -> None:
    arguments = ("launch", config_file, "--nodes", 2, "--backend", "local", "--name", "dry", "--dry-run")
    done = alignkd(*arguments, "--set", "training.learning_rate=1e-4")
    assert done.returncode == 0, done.stderr
    assert done.is_light
    run = tmp_path / "runs" / "dry"
    assert "would run 2 times" in done.stdout
    assert "on CPUs (gloo)" in done.stdout
    assert "student.json" in done.stdout
    for command in ("list", "verify"):
        checkpoints = alignkd("ckpt", command, run)
        assert checkpoints.returncode == 0
        assert checkpoints.stdout == f"{run}: no checkpoint yet; see: alignkd status {run}\n"
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["accumulation_steps"], manifest["device"]) == (2, 2, "cpu")
    assert "learning_rate: 0.0001" in (run / "config.yaml").read_text()
    assert json.loads((run / "ds/teacher.json").read_text())["zero_optimization"]["stage"] == 3
    assert list((run / "logs").iterdir()) == []
    again = alignkd(*arguments[:-1])
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


def test_a_launch_reports_all_problems_at_once_and_writes_nothing(config_file, tmp_path) -> None:
    done = alignkd(
        *("launch", config_file, "--nodes", 3, "--backend", "local"),
        *("--set", "data.sources.0.file=missing.json", "--set", "data.sources.0.image_folder=nowhere"),
        *("--set", "distillation.top_k=500"),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in ("missing.json: no such file", "nowhere: no such folder", "over 3 ranks", "top_k is 500"):
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


def test_missing_models_are_reported_with_the_run_that_will_write_them(config_file) -> None:
    missing = ("--set", "model.teacher=/nowhere", "--set", "model.student=/also")
    done = alignkd("launch", config_file, "--backend", "local", *missing)
    assert done.returncode == 2
    assert "model.teacher = /nowhere: no such folder" in done.stderr
    assert "model.student = /also: no such folder" in done.stderr
    early = ("--set", "model.student=runs/first/student", "--set", "model.adapters=runs/first")
    done = alignkd("launch", config_file, "--backend", "local", "--dry-run", *early, cwd=config_file.parent)
    assert done.returncode == 2
    assert "runs/first/student: no such folder; run first writes it when it ends" in done.stderr
    assert "runs/first: no such file or folder; run first writes it when it ends" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("launch", "missing.yaml", "--backend", "local"), "no such file"),
        (("resume", "missing"), "not a run folder"),
        (("resume", "missing", "--allow-change", "training.epochs"), "not a run folder"),
        (("init", "--preset", "nope"), "- sample: the small task"),
        (("launch", "--backend", "mpi"), "'auto', 'local', 'slurm', 'ssh'"),
        (("launch", "--backend", "ssh"), "needs --hostfile"),
        (("launch", "--nodes", "0"), "greater than or equal to 1"),
        (("no-such-command",), "No such command"),
    ],
)
def test_user_errors_exit_with_2_without_a_traceback(tmp_path, arguments, message) -> None:
    done = alignkd(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_resuming_a_finished_run_does_nothing(make_run) -> None:
    run, _ = make_run()
    (run / "result.json").write_text('{"status": "done", "step": 5, "total_steps": 5}')
    done = alignkd("resume", run)
    assert (done.returncode, done.stdout.strip()) == (0, f"{run} is done: 5 of 5 steps")


def test_list_skips_a_folder_that_is_not_a_run_and_shows_the_others(make_run) -> None:
    run, _ = make_run()
    (run.parent / "data").mkdir()
    (run.parent / "data" / "manifest.json").write_text("[]")
    done = alignkd("list", run.parent)
    assert done.returncode == 0
    assert f"\n{run.name} " in done.stdout
    assert "skipped: " in done.stderr


def test_probe_prints_only_json_on_stdout(tmp_path) -> None:
    fixture = ROOT / "tests" / "fixtures" / "mobilevlm_v2_tiny"
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    data.write_text(json.dumps([{"id": "a", "image": "image_0.png", "conversations": turns}]))
    done = alignkd(
        *("probe", "--teacher", fixture / "teacher", "--student", fixture / "student", "--data", data),
        *("--image-folder", fixture, "--template", "v1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values.keys() == {"terms", "counts", "weights", "gradient_norms", "parts"}
    assert values["terms"].keys() >= {"ce", "reverse_kl", "attention", "vision_all", "vision_focus", "total"}
