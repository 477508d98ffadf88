"""Create the folder of a run: in one step, and never over an existing one."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from alignkd.config import Config, dump_config
from alignkd.errors import UserError, raise_if_passing
from alignkd.run_folder.atomic_files import write_json, write_text_atomic
from alignkd.run_folder.paths import ENVIRONMENT_SCRIPT, RunPaths
from launcher.run.manifest import Manifest


def run_path(config: Config) -> Path:
    return Path(config.run.folder) / config.run.name


def existing_run_problem(run: Path, replace: bool = False) -> str | None:
    """Why no run can be created at ``run``; None when nothing is there.

    With ``replace`` also None when a run folder is there that was never started.
    """
    if not os.path.lexists(run) or (replace and _never_started(run) and not _edited(run)):
        return None
    if replace and _never_started(run):
        return (
            f"{run} was written by an earlier --dry-run, and edited since: {', '.join(_edited(run))}; "
            f"start it (`alignkd resume {shlex.quote(str(run))}`), move it away, or give another --name"
        )
    return (
        f"{run} exists already and is never overwritten; give the new run another name (--name), "
        f"resume the existing one (`alignkd resume {shlex.quote(str(run))}`), or move it away"
    )


def write_scripts(run: Path, scripts: dict[str, str]) -> None:
    """Replace scripts of a run folder, by name.

    All can be executed by whom the umask allows, except env.sh: only its owner reads what a site needs there.
    """
    executable = _mode_of(RunPaths(run).logs)
    for name, text in scripts.items():
        write_text_atomic(run / name, text, mode=0o600 if name == ENVIRONMENT_SCRIPT else executable)


def write_job(folder: Path, scripts: dict[str, str]) -> None:
    """The scripts of a job that is no run, and the folder of its logs. Raises UserError."""
    try:
        RunPaths(folder).logs.mkdir(exist_ok=True)
        write_scripts(folder, scripts)
    except OSError as error:
        raise_if_passing(error, folder)
        raise UserError(f"{folder}: cannot be written ({error})") from None


def _mode_of(folder: Path) -> int:
    """Of a folder that was created by the umask."""
    return folder.stat().st_mode & 0o777


def _never_started(run: Path) -> bool:
    """Is it a run folder that no launcher and no job has used?"""
    paths = RunPaths(run)
    used = (paths.launcher_lock, paths.job, paths.open_attempt, paths.attempts, paths.metrics)
    if not paths.manifest.is_file() or run.is_symlink() or any(path.exists() for path in used):
        return False
    return not any([*paths.logs.glob("*"), *paths.checkpoints.glob("*")])


def _edited(run: Path) -> list[str]:
    """Files that were changed after the run folder was complete: its manifest is written last."""
    paths = RunPaths(run)
    scripts = (paths.job_script, paths.rank_script, paths.environment_script)
    written = paths.manifest.stat().st_mtime
    files = (paths.config, paths.student_deepspeed, paths.teacher_deepspeed, *scripts)
    return [path.name for path in files if path.exists() and path.stat().st_mtime > written]


def create_run_folder(
    config: Config,
    manifest: Manifest,
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    scripts: dict[str, str],
    replace: bool = False,
) -> Path:
    """Write the run folder and return it.

    It is filled under a temporary name and renamed, so a folder with a manifest is always complete.
    ``student`` and ``teacher`` are DeepSpeed configurations; ``scripts`` maps the names of executable files
    to their texts. ``replace`` removes a run folder that was never started.
    Raises UserError when the folder exists or cannot be written.
    """
    run = run_path(config)
    problem = existing_run_problem(run, replace)
    if problem:
        raise UserError(problem)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        filling = Path(tempfile.mkdtemp(prefix=f".{run.name}.", dir=run.parent))
        made = RunPaths(filling)
        try:
            for folder in (made.deepspeed, made.logs, made.checkpoints):
                folder.mkdir()
            write_text_atomic(made.config, dump_config(config))
            write_json(made.student_deepspeed, student)
            if teacher is not None:
                write_json(made.teacher_deepspeed, teacher)
            write_scripts(filling, scripts)
            write_json(made.manifest, manifest.as_dict())
            filling.chmod(_mode_of(made.logs))  # mkdtemp creates a private folder, whatever the umask
            if os.path.lexists(run):
                run.rename(filling.with_name(f"{filling.name}.replaced"))
            filling.rename(run)
            shutil.rmtree(filling.with_name(f"{filling.name}.replaced"), ignore_errors=True)
        except BaseException:
            shutil.rmtree(filling, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(existing_run_problem(run) or f"{run}: cannot be created: {error.strerror}") from error
    return run
