"""``alignkd resume``: continue a run from a checkpoint, optionally at another size."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from alignkd.config import load_run_config
from alignkd.errors import EXIT_OK, EXIT_SAVED_ON_TERM, EXIT_SAVED_ON_USR1, UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.saved_steps import missing_checkpoints
from alignkd.run_folder.writer_lock import WriterLock
from alignkd.text import counted
from launcher.backends import backend_named
from launcher.backends.base import Started
from launcher.backends.hostfile import Host
from launcher.commands.resize import fit_run, memory_warnings, renew_scripts
from launcher.render.deepspeed import batch_split
from launcher.run.checkpoints import changes_allowed, check_changes, check_step
from launcher.run.console import say
from launcher.run.from_scratch import saves_given_up
from launcher.run.lock import only_launcher
from launcher.run.manifest import Manifest, read_manifest
from launcher.run.rollback import rollback_to

STARTED = (EXIT_OK, EXIT_SAVED_ON_USR1, EXIT_SAVED_ON_TERM)  # codes of a start that has loaded its checkpoint


@dataclass(frozen=True)
class ResumeRequest:
    """None and empty keep what the run has."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    hostfile: Path | None = None  # other hosts for the ssh back end
    step: int | None = None  # checkpoint to roll back to
    allowed_changes: tuple[str, ...] = ()  # keys that may differ from the checkpoint's
    from_scratch: bool = False  # train from step 0; what was saved is set aside


def resume_run(run: Path, request: ResumeRequest, console: Console) -> dict[str, Any]:
    """Resume a run from its newest checkpoint or a given one, optionally at another size.

    Raises UserError when it cannot be resumed or is running; the run folder is unchanged then. When sbatch
    refuses the job, only a resize and re-rendered scripts have taken effect.
    """
    run = Path(os.path.abspath(run))
    read_manifest(run)  # refuses any other folder
    check_changes(run, request.allowed_changes)
    result = read_json(RunPaths(run).result) or {}
    if request.from_scratch:
        if request.step is not None:
            raise UserError("--from-scratch and --step exclude each other")
    elif request.step is not None:
        check_step(run, request.step)
    elif result.get("status") == "done":
        say(console, f"{run} is done: {result.get('step')} of {result.get('total_steps')} steps")
        return {"run": str(run), "state": "done", "code": 0, "job": None}
    with only_launcher(run):  # before any file changes: the command may have been typed twice
        code, job = _restart(run, request, console)
    return {"run": str(run), "state": "queued" if job else "ended", "code": code, "job": job}


def _restart(run: Path, request: ResumeRequest, console: Console) -> Started:
    manifest = read_manifest(run)
    backend = backend_named(manifest.backend)
    backend.check_idle(run)
    for warning in backend.resume_warnings(run, load_run_config(RunPaths(run).config)):
        say(console, f"warning: {warning}")
    missing = None if request.from_scratch else missing_checkpoints(run)
    if missing is not None:
        raise UserError(missing)
    step = 0 if request.from_scratch else request.step
    hosts = backend.hosts(request.hostfile, request.nodes, request.gpus_per_node) if request.hostfile else ()

    def note(text: str) -> None:
        say(console, text)

    with contextlib.ExitStack() as undone_on_failure:
        # Without file locks, or with those of another login node, only this tells whether the run is alive.
        with WriterLock(run, note):
            manifest = _fit(run, request, manifest, step, hosts, console)
            undone_on_failure.enter_context(changes_allowed(run, request.allowed_changes))
            rollback = undone_on_failure.enter_context(rollback_to(run, step, note))
            old_metrics = undone_on_failure.enter_context(saves_given_up(run, request.from_scratch))
        for name in [*rollback.set_aside, *([old_metrics] if old_metrics else [])]:
            note(f"set aside: {name}")
        note(f"resuming {run} on {counted(manifest.world_size, 'rank')} ({manifest.backend})")
        started = backend.start(run, manifest, console)
        if started.code not in STARTED:
            rollback.undo(note)
        return started


def _fit(
    run: Path,
    request: ResumeRequest,
    manifest: Manifest,
    step: int | None,
    hosts: Sequence[Host],
    console: Console,
) -> Manifest:
    """Make the run folder fit the size that was asked for, and this version."""
    RunPaths(run).stop.unlink(missing_ok=True)  # meant for an earlier start
    before = manifest.world_size
    manifest = fit_run(run, manifest, request.nodes, request.gpus_per_node, hosts, step)
    if manifest.world_size != before:
        split = batch_split(load_run_config(RunPaths(run).config).training, manifest.world_size)
        say(console, f"resized from {before} to {counted(manifest.world_size, 'rank')}; {split}")
        for warning in memory_warnings(run, manifest):
            say(console, f"warning: {warning}")
    if renew_scripts(run, manifest):
        say(
            console,
            "re-rendered the job scripts of another version of alignkd; kept as job.sbatch.old, rank.sh.old",
        )
    return manifest
