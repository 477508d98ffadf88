import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RUNS = ("status", "logs", "stop", "cancel", "list", "ckpt", "explain", "drill")
HEAVY = ("torch", "transformers", "deepspeed", "numpy")


def alignkd(*arguments: object, cwd: Path = ROOT, columns: int = 80) -> subprocess.CompletedProcess[str]:
    """The command in an own process; the last line of stderr names the heavy modules that it imported."""
    program = (
        "import atexit, sys\n"
        f"heavy = lambda: [name for name in {HEAVY!r} if name in sys.modules]\n"
        "atexit.register(lambda: print('heavy:', heavy(), file=sys.stderr))\n"
        "from launcher.cli.app import main\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=120,
    )


def is_light(done: subprocess.CompletedProcess[str]) -> bool:
    return done.stderr.splitlines()[-1] == "heavy: []"


def test_the_surface(tmp_path) -> None:
    done = alignkd("--help")
    assert done.returncode == 0
    assert is_light(done)
    for command in ("init", "plan", "launch", "resume", "probe", "sample-data", "export", *RUNS):
        assert f"\n  {command} " in done.stdout
        help_text = alignkd(command, "--help")
        assert help_text.returncode == 0
        assert is_light(help_text)
        assert max(map(len, help_text.stdout.splitlines())) <= 80
    for text in (done.stdout, alignkd("ckpt", "--help").stdout):
        lines = text.partition("Commands:")[2]
        assert lines
        assert "..." not in lines  # each is whole on a terminal of 80 columns
    options = alignkd("launch", "--help").stdout
    for name in ("--nodes", "--gpus-per-node", "--backend", "--name", "--stage", "--set", "--dry-run"):
        assert name in options
    assert alignkd("--version").stdout.startswith("alignkd ")


def test_what_the_file_system_refuses_is_one_sentence() -> None:
    for arguments in (("plan", "x" * 300), ("ckpt", "list", "x" * 300), ("status", "x" * 300)):
        done = alignkd(*arguments)
        assert done.returncode == 2
        assert "File name too long" in done.stderr or "not a run folder" in done.stderr
        assert "Traceback" not in done.stderr


def test_init(tmp_path) -> None:
    done = alignkd("init", "--preset", "sample", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "wrote alignkd.yaml\n")
    assert is_light(done)
    assert "stages:" in (tmp_path / "alignkd.yaml").read_text()
    again = alignkd("init", "--preset", "sample", cwd=tmp_path)
    assert again.returncode == 2
    assert "already exists" in again.stderr
    assert alignkd("init", "--preset", "sample", "--force", cwd=tmp_path).returncode == 0


def test_dry_run_writes_prints_and_stops(config_file, tmp_path) -> None:
    arguments = ("launch", config_file, "--nodes", 2, "--backend", "local", "--name", "dry", "--dry-run")
    done = alignkd(*arguments, "--set", "training.learning_rate=1e-4")
    assert done.returncode == 0, done.stderr
    assert is_light(done)
    run = tmp_path / "runs" / "dry"
    assert "would run 2 times" in done.stdout
    assert "running on the CPU" in done.stdout
    assert "student.json" in done.stdout
    for command in ("list", "verify"):
        checkpoints = alignkd("ckpt", command, run)
        assert checkpoints.returncode == 0
        assert checkpoints.stdout == f"{run}: no checkpoint yet; what it is doing: alignkd status {run}\n"
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["accumulation_steps"], manifest["device"]) == (2, 2, "cpu")
    assert "learning_rate: 0.0001" in (run / "config.yaml").read_text()
    assert json.loads((run / "ds/teacher.json").read_text())["zero_optimization"]["stage"] == 3
    assert list((run / "logs").iterdir()) == []
    again = alignkd(*arguments)
    assert again.returncode == 2
    assert "never overwritten" in again.stderr


def test_all_problems_of_a_launch_at_once_and_nothing_is_written(config_file, tmp_path) -> None:
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


def test_missing_models_are_named(config_file) -> None:
    done = alignkd("launch", config_file, "--set", "model.teacher=/nowhere", "--set", "model.student=/also")
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
        (("launch", "missing.yaml"), "no such file"),
        (("resume", "missing"), "not a run folder"),
        (("resume", "missing", "--allow-change", "training.epochs"), "not a run folder"),
        (("init", "--preset", "nope"), "valid: sample"),
        (("launch", "--backend", "mpi"), "'auto', 'local', 'slurm', 'ssh'"),
        (("launch", "--backend", "ssh"), "needs --hostfile"),
        (("launch", "--nodes", "0"), "greater than or equal to 1"),
        (("no-such-command",), "No such command"),
    ],
)
def test_user_errors_exit_with_2_and_no_traceback(tmp_path, arguments, message) -> None:
    done = alignkd(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_resume_of_a_finished_run_does_nothing(make_run) -> None:
    run, _ = make_run()
    (run / "result.json").write_text('{"status": "done", "step": 5, "total_steps": 5}')
    done = alignkd("resume", run)
    assert (done.returncode, done.stdout.strip()) == (0, f"{run} is done: 5 of 5 steps")


def test_a_folder_that_is_no_run_hides_no_other(make_run) -> None:
    run, _ = make_run()
    (run.parent / "data").mkdir()
    (run.parent / "data" / "manifest.json").write_text("[]")
    done = alignkd("list", run.parent)
    assert done.returncode == 0
    assert f"\n{run.name} " in done.stdout
    assert "left out" in done.stderr


def test_probe_prints_nothing_but_json(tmp_path) -> None:
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
    assert values.keys() == {"terms", "counts", "gradient_norms"}
    assert values["terms"].keys() >= {"ce", "reverse_kl", "attention", "vision_all", "vision_focus", "total"}
