"""``alignkd ckpt``: which checkpoints a run has, and whether their files are what was written. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkd.config.dotted import did_you_mean, flatten
from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import write_json, write_text_atomic
from alignkd.run_folder.checkpoints import (
    MANIFEST,
    committed_steps,
    is_marked,
    read_manifest,
    step_folder,
    step_name,
)
from alignkd.run_folder.drift import IMAGES, allowed_changes, saved_stage, with_accepted
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.verification import problems_of, size_differences
from alignkd.text import listed

IN_DEEPSPEED_FILES = (
    "student.offload",
    "student.zero_stage",
    "training.global_batch_size",
    "training.max_gradient_norm",
    "training.micro_batch_size",
    "training.precision",
)


@dataclass(frozen=True)
class CheckpointSummary:
    """One folder in ``checkpoints``. ``state`` is "committed", "verified", "not committed" or "broken";
    ``problems`` says why. The names are those of ``alignkd.run_folder.checkpoints``."""

    name: str
    step: int | None
    state: str
    world_size: int | None
    zero_stage: int | None
    bytes: int
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_checkpoints(
    run: Path, verify: bool, progress: Callable[[str], None] = lambda _name: None
) -> list[CheckpointSummary]:
    """All checkpoints of a run, oldest first; ``verify`` hashes every file. Raises UserError when ``run`` is
    not a run folder."""
    _check_is_run(run)
    folders = [path for path in RunPaths(run).checkpoints.glob("step-*") if path.is_dir()]
    found = []
    for folder in sorted(folders, key=_order):
        progress(folder.name)
        found.append(_summary(folder, verify))
    return found


def check_changes(run: Path, keys: Sequence[str]) -> None:
    """Raises UserError for a key that is unknown, or fixed in the run's DeepSpeed files."""
    from alignkd.config import load_run_config

    known = [*flatten(load_run_config(RunPaths(run).config).model_dump()), IMAGES] if keys else []
    for key in keys:
        if key in IN_DEEPSPEED_FILES:
            raise UserError(
                f"--allow-change {key}: is fixed in the run's DeepSpeed files; start a new run for it"
            )
        if key not in known:
            raise UserError(f"--allow-change {key}: no such key{did_you_mean(key, known)}")


@contextlib.contextmanager
def changes_allowed(run: Path, keys: Sequence[str]) -> Iterator[None]:
    """Record that these keys may have their present values although the checkpoint's differ; undone when the
    block fails."""
    path = RunPaths(run).allowed_changes
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if keys:
        from alignkd.config import load_run_config

        config = load_run_config(RunPaths(run).config).model_dump(mode="json")
        accepted = with_accepted(allowed_changes(run), keys, config)
        if IMAGES in keys:  # a change from what these checkpoints have, not from later ones
            accepted[IMAGES] = sorted(_image_sizes(run))
        write_json(path, accepted)
    try:
        yield
    except BaseException:
        if keys and before is not None:
            write_text_atomic(path, before)
        elif keys:
            path.unlink(missing_ok=True)
        raise


def _image_sizes(run: Path) -> set[str]:
    """Hashes of sizes in the checkpoints of a run."""
    found = set()
    for step in committed_steps(run):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or of an older version
            found.add(str(read_manifest(step_folder(run, step))["images"]["sizes"]))
    return found


def step_of(run: Path, step: int | None) -> int:
    """``step``, or the newest one. Raises UserError when there is no such checkpoint."""
    _check_is_run(run)
    steps = committed_steps(run)
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {run} has no such checkpoint; valid: {listed(sorted(steps))}")
    return steps[0] if step is None else step


def check_step(run: Path, step: int) -> None:
    """Hash the checkpoint that a user wants to roll back to. Raises UserError when it is missing or
    damaged."""
    step_of(run, step)
    summary = _summary(step_folder(run, step), verify=True)
    if summary.problems:
        raise UserError(f"--step {step}: {step_name(step)} is broken: {'; '.join(summary.problems[:3])}")


def _check_is_run(run: Path) -> None:
    if not RunPaths(run).config.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")


def _summary(folder: Path, verify: bool) -> CheckpointSummary:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    step: int | None = None
    world_size: int | None = None
    stage: int | None = None
    try:
        manifest = read_manifest(folder)
        step, world_size = int(manifest["step"]), int(manifest["world_size"])
        stage = saved_stage(manifest) if "config" in manifest else int(manifest["zero_stage"])
        problems = problems_of(folder) if verify else size_differences(folder, manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems = [f"{MANIFEST} cannot be read ({error})"]
    if not is_marked(folder):
        return CheckpointSummary(folder.name, step, "not committed", world_size, stage, size)
    state = "broken" if problems else "verified" if verify else "committed"
    return CheckpointSummary(folder.name, step, state, world_size, stage, size, tuple(problems))


def _order(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("step-").split(".")[0]
    return (int(digits) if digits.isdigit() else -1, folder.name)
