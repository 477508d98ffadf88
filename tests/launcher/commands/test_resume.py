"""Resuming a run: what prevents it, what is undone, and run folders of earlier versions."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import AlignkdError, UserError
from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import QueuedJob, Started
from launcher.backends.slurm import backend as slurm
from launcher.commands import resume
from launcher.commands.launch import write_run
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.plan.workload import Cluster
from launcher.run.attempts import Attempt
from launcher.run.manifest import Manifest


def test_a_resume_is_refused_while_a_job_of_the_run_is_queued(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run
    queued = [QueuedJob("7", "RUNNING", "None", None, str(run / "job.sbatch"))]
    monkeypatch.setattr(slurm, "own_jobs", lambda: queued)
    before = (run / "manifest.json").read_text()
    with pytest.raises(UserError, match="job 7 is running already"):
        resume_run(run, ResumeRequest(nodes=2), Console(quiet=True))
    assert (run / "manifest.json").read_text() == before


def test_a_resume_is_refused_while_an_allocation_trains_the_run(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    with pytest.raises(UserError, match="job 7 is training it"):
        resume_run(run, ResumeRequest(), Console(quiet=True))
    monkeypatch.setattr(slurm, "running_jobs", lambda _jobs: set())  # it was killed
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


@pytest.mark.parametrize("silent", ["own_jobs", "running_jobs"])
def test_a_resume_is_refused_while_slurm_does_not_answer(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """A job of the run may be in the queue: a second one would only wait to be refused."""
    run = slurm_run
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "7", "n1", 0.0, 0)))
    monkeypatch.setattr(slurm, silent, lambda *_: None)
    before = (run / "manifest.json").read_text()
    with pytest.raises(AlignkdError, match="Slurm does not answer"):
        resume_run(run, ResumeRequest(nodes=2), Console(quiet=True))
    assert (run / "manifest.json").read_text() == before


def test_an_attempt_that_was_killed_in_this_allocation_does_not_prevent_a_resume(slurm_run: Path) -> None:
    run = slurm_run
    write_json(RunPaths(run).open_attempt, asdict(Attempt(1, "8", "n1", 0.0, 0)))
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


def test_the_second_of_two_resumes_is_refused_before_it_changes_anything(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first is about to rewrite the run's files."""
    run = slurm_run
    seen: list[str] = []

    def fit(folder: Path, manifest: Manifest, *_: object) -> Manifest:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="another launcher runs it"):
            resume_run(
                folder, ResumeRequest(allowed_changes=("training.learning_rate",)), Console(quiet=True)
            )
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        seen.append("refused")
        return manifest

    monkeypatch.setattr(resume, "fit_run", fit)
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0
    assert seen == ["refused"]


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").touch()


def test_a_start_that_sbatch_refuses_leaves_the_run_unchanged(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run
    for step in (10, 20, 30):
        checkpoint(run, step)
    write_json(run / "result.json", {"status": "done"})
    write_json(run / "allowed_changes.json", ["data.seed"])
    monkeypatch.setattr(resume, "check_step", lambda *_: None)
    monkeypatch.setattr(resume, "check_changes", lambda *_: None)
    request = ResumeRequest(step=10, allowed_changes=("training.learning_rate",))

    def refuse(*_: object) -> tuple[int, None]:
        assert committed_steps(run) == [10]  # the start would have resumed from there
        assert "training.learning_rate" in (run / "allowed_changes.json").read_text()
        raise AlignkdError("sbatch refused it: no such account")

    def state() -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in run.rglob("*")
            if path.name != ".lock" and RunPaths(run).writers not in (path, path.parent)
        }

    before = state()
    monkeypatch.setattr(slurm.SlurmBackend, "start", refuse)
    with pytest.raises(AlignkdError, match="no such account"):
        resume_run(run, request, Console(quiet=True))
    assert state() == before
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: Started(0, None))
    resume_run(run, request, Console(quiet=True))
    assert committed_steps(run) == [10]
    assert sorted(json.loads((run / "allowed_changes.json").read_text())) == [
        "data.seed",
        "training.learning_rate",
    ]
    assert not (run / "result.json").exists()


def test_a_resume_that_would_silently_start_over_is_refused_until_it_is_meant(
    slurm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = slurm_run
    attempt = Attempt(1, "7", "n1", 0.0, 0, saved_step=40)
    (run / "attempts.jsonl").write_text(json.dumps(asdict(attempt)) + "\n")
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: pytest.fail("it was started"))
    with pytest.raises(UserError, match=r"step 40 was saved(.|\n)*--from-scratch"):
        resume_run(run, ResumeRequest(), Console(quiet=True))
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: Started(0, None))
    assert resume_run(run, ResumeRequest(from_scratch=True), Console(quiet=True))["code"] == 0
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["code"] == 0


def test_from_scratch_sets_the_checkpoints_of_a_finished_run_aside(slurm_run: Path) -> None:
    run = slurm_run
    checkpoint(run, 10)
    write_json(run / "result.json", {"status": "done"})
    with pytest.raises(UserError, match="exclude each other"):
        resume_run(run, ResumeRequest(step=10, from_scratch=True), Console(quiet=True))
    assert resume_run(run, ResumeRequest(), Console(quiet=True))["state"] == "done"
    assert resume_run(run, ResumeRequest(from_scratch=True), Console(quiet=True))["state"] == "ended"
    assert committed_steps(run) == []
    assert (run / "checkpoints" / "step-10.set-aside" / "COMMITTED").exists()


def test_a_resume_warns_of_a_container_that_does_not_show_the_run_and_goes_by_its_script(
    make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What apptainer mounted for the launch may have been set in another shell, or by hand in job.sbatch."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(slurm, "own_jobs", list)
    monkeypatch.setattr(slurm.SlurmBackend, "start", lambda *_: Started(0, "42"))
    run = write_run(make_config("slurm.container={kind: apptainer, image: x}"), Cluster(1, 1), "slurm")
    model = Path(make_config().model.student).parent
    # Without its default mounts, which may hold the temporary folder of this test.
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("APPTAINER_BIND", f"/nowhere:/tmp,/nowhere:{run.parents[1]},{model}")
    scripts = [RunPaths(run).job_script, RunPaths(run).environment_script]
    before = [path.read_bytes() for path in scripts]

    def warnings() -> list[str]:
        output = io.StringIO()
        assert resume_run(run, ResumeRequest(), Console(file=output, width=1000))["job"] == "42"
        assert [path.read_bytes() for path in scripts] == before
        return re.findall(r"^warning: (.*)$", output.getvalue(), re.MULTILINE)

    *missing, note = warnings()
    assert [text.partition(": no mount of the container")[0] for text in missing] == [
        f"run.folder = {run}",
        f"data.sources[0].file = {make_config().data.sources[0].file}",
    ]
    assert f"the job does as {run / 'job.sbatch'} and env.sh say" in note
    monkeypatch.setenv("APPTAINER_BIND", f"{run.parents[1]},{model}")
    assert warnings() == []
    monkeypatch.setenv("APPTAINER_BIND", "")
    config, mounts = RunPaths(run).config, f"mounts: ['{run.parents[1]}', '{model}']"
    config.write_text(config.read_text().replace("mounts: []", mounts))
    assert warnings() == []  # job.sbatch is not read, as docs/slurm.md says


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node with an sbatch that writes the script it gets to this path, and an empty queue."""
    copy = tmp_path / "submitted.sbatch"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/bash\n/bin/cp "${{@: -1}}" {copy}\necho 42\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return copy


def alignkd_resume(run: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "resume", str(run), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_job_scripts_of_an_earlier_version_are_re_rendered(make_config, submitted: Path) -> None:
    """They call modules that have moved: ``launcher.batch`` and ``launcher.operators``."""
    run = write_run(make_config("slurm.gpu_option=none"), Cluster(2, 2), "slurm")
    paths = RunPaths(run)
    current = {path: path.read_text() for path in (paths.job_script, paths.rank_script)}
    for path, text in current.items():
        lines = [line for line in text.splitlines() if not line.startswith("# Script format ")]
        assert len(lines) == len(text.splitlines()) - 1
        path.write_text("\n".join(lines).replace("launcher.backends.slurm.batch", "launcher.batch") + "\n")
    build = 'TORCH_EXTENSIONS_DIR=$("$PYTHON" -m launcher.operators) || exit\n'
    paths.rank_script.write_text(paths.rank_script.read_text() + build)
    with paths.environment_script.open("a") as file:
        file.write("export NCCL_DEBUG=INFO\n")
    environment = paths.environment_script.read_text()
    earlier = {path: path.read_text() for path in current}

    assert "submitted job 42" in (output := alignkd_resume(run))
    assert "re-rendered the job scripts" in output
    assert {path: path.read_text() for path in current} == current
    assert {path: path.with_name(path.name + ".old").read_text() for path in current} == earlier
    assert submitted.read_text() == current[paths.job_script]
    assert os.access(paths.job_script, os.X_OK)
    assert paths.environment_script.read_text() == environment


def test_edits_of_current_job_scripts_are_kept(make_config, submitted: Path) -> None:
    run = write_run(make_config(), Cluster(1, 1), "slurm")
    with RunPaths(run).job_script.open("a") as file:
        file.write("# edited by hand\n")
    assert "re-rendered" not in alignkd_resume(run)
    assert submitted.read_text().endswith("# edited by hand\n")
