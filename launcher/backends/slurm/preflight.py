"""What Slurm would say of a job, and what it would not say: asked before anything is written."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from alignkd.config import Config
from alignkd.config.slurm_section import SlurmSection
from alignkd.errors import CheckpointError
from alignkd.run_folder.paths import JOB_SCRIPT
from launcher.backends.slurm.client import ask, clean_environment, field_of
from launcher.plan.sizes import run_sizes
from launcher.render.job_scripts import render_scripts
from launcher.run.folder import run_path

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"}
_STATE_BYTES = 12  # fp32 master weight and two moments, of each trainable parameter


def slurm_problems(config: Config, nodes: int, gpus_per_node: int) -> list[str]:
    """Every reason why Slurm would refuse, or never start, the run's job."""
    run = run_path(config)
    scripts = render_scripts(config, run, nodes, gpus_per_node)
    problems = [text for name, script in scripts.items() if (text := _syntax(name, script))]
    problems += _partition_problems(config.slurm, nodes)
    problems += _lead_problems(config.slurm)
    container = config.slurm.container
    if container.kind != "none" and container.image is None:
        problems.append(f"slurm.container.kind = {container.kind} needs slurm.container.image")
    if not problems:
        problems += _test_only(scripts[JOB_SCRIPT])
    return problems


def slurm_warnings(config: Config, nodes: int) -> list[str]:
    """What may go wrong and cannot be known from here."""
    kind = file_system(run_path(config))
    if nodes > 1 and kind in _LOCAL:
        return [f"run.folder is on {kind}, which other nodes rarely see; a shared file system is needed"]
    return []


def space_problems(config: Config) -> list[str]:
    """Is there room for the checkpoints that are kept? They are counted from the student's config.json."""
    try:
        sizes = run_sizes(config)
    except CheckpointError:
        return []  # said elsewhere
    trainable, frozen = sum(sizes.trainable(config).values()), sum(sizes.frozen(config).values())
    weight_bytes = 4 if config.training.precision == "fp32" else 2
    one = trainable * (weight_bytes + _STATE_BYTES) + frozen * weight_bytes
    count = (config.checkpoint.keep_last or 10) + 1  # the new one is whole before an old one goes
    place = _existing(run_path(config))
    free = shutil.disk_usage(place).free
    if one * count <= free:
        return []
    return [
        f"{place}: {free / 1e9:.1f} GB free, and {count} checkpoints take about {one * count / 1e9:.1f} GB; "
        "make room, lower checkpoint.keep_last, or name another run.folder"
    ]


def file_system(path: Path) -> str:
    """Type of the file system that ``path`` will be on, as /proc/mounts has it."""
    place, best, kind = str(_existing(path)), "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in mounts:
        mount, found = (part.encode().decode("unicode_escape") for part in line.split()[1:3])
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def minutes(limit: str) -> float | None:
    """A time limit of Slurm in minutes; None for UNLIMITED."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", limit):
        return None
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)


def _partition_problems(slurm: SlurmSection, nodes: int) -> list[str]:
    text = ask("scontrol", "show", "partition", "--oneliner")
    if text is None:
        return ["Slurm does not answer here: `scontrol show partition` failed"]
    partitions = {name: line for line in text.splitlines() if (name := field_of(line, "PartitionName"))}
    if slurm.partition is None:
        chosen = [line for line in partitions.values() if field_of(line, "Default") == "YES"]
        if not chosen:
            return [f"slurm.partition: this cluster has no default; valid: {', '.join(partitions)}"]
    else:
        names = slurm.partition.split(",")
        unknown = [name for name in names if name not in partitions]
        if unknown:
            return [f"slurm.partition = {slurm.partition}: no such partition; valid: {', '.join(partitions)}"]
        chosen = [partitions[name] for name in names]
    problems = []
    most = max(int(field_of(line, "TotalNodes") or 0) for line in chosen)
    if nodes > most:
        problems.append(f"--nodes {nodes}: the partition has {most} nodes")
    limits = [minutes(field_of(line, "MaxTime") or "") for line in chosen]
    wanted = minutes(slurm.time_limit) if slurm.time_limit else None
    finite = [limit for limit in limits if limit is not None]
    if wanted is not None and len(finite) == len(limits) and wanted > max(finite):
        problems.append(
            f"slurm.time_limit = {slurm.time_limit}: the partition gives at most {max(finite):g} minutes; "
            "a run may be longer than that, it is requeued"
        )
    return problems


def _lead_problems(slurm: SlurmSection) -> list[str]:
    limit = minutes(slurm.time_limit) if slurm.time_limit else None
    if limit is None or slurm.signal_seconds + 60 < limit * 60:
        return []
    return [
        f"slurm.signal_seconds = {slurm.signal_seconds}: with up to 60 s that Slurm may be early, the ranks "
        f"would be told to save at once; slurm.time_limit is {slurm.time_limit}"
    ]


def _syntax(name: str, script: str) -> str | None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    return (
        f"{name}: bash cannot read it (slurm.activate?): {done.stderr.strip()}" if done.returncode else None
    )


def _test_only(script: str) -> list[str]:
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60,
            env=clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return [f"sbatch --test-only did not answer: {error}"]
    said = " ".join(line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines())
    return [f"sbatch refuses the job: {said}"] if done.returncode else []


def _existing(path: Path) -> Path:
    return next(parent for parent in [path, *path.parents] if parent.exists())
