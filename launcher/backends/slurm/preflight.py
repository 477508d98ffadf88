"""Why Slurm would refuse a job, or never start it. Checked before anything is written."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from alignkd.config import Config
from alignkd.config.slurm_section import SlurmSection, time_limit_seconds
from alignkd.run_folder.paths import JOB_SCRIPT, RunPaths
from alignkd.text import counted
from launcher.backends.node_probe import read_places
from launcher.backends.slurm.client import field_of, run_slurm_command
from launcher.backends.slurm.submission import submission_environment
from launcher.render.container_mounts import container_problems
from launcher.render.job_scripts import render_scripts
from launcher.run.disk import file_system
from launcher.run.folder import run_path

_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs"}
_TIME_LIMIT = r"(\d+-)?\d+(:\d{1,2}){0,2}"


def slurm_problems(config: Config, nodes: int, gpus_per_node: int) -> list[str]:
    """Every reason why Slurm would refuse, or never start, the run's job."""
    run = run_path(config)
    scripts = render_scripts(config, run, nodes, gpus_per_node)
    more = [*_lead_problems(config.slurm), *mount_problems(run, config)]
    return script_problems(config.slurm, nodes, scripts, more)


def mount_problems(run: Path, config: Config) -> list[str]:
    """A line for each place that the run reads or writes and that the mounts of its container do not show.

    A new run and a resumed one are checked alike: apptainer takes mounts from the shell that submits the job.
    """
    places = {"run.folder": run, **{place.key: place.path for place in read_places(config)}}
    if (checkpoints := RunPaths(run).checkpoints).is_symlink():
        places["checkpoints"] = checkpoints
    return container_problems(config.slurm, places)


def mount_warnings(run: Path, config: Config) -> list[str]:
    """``mount_problems`` of a run whose scripts exist. Only warnings: the job does as ``job.sbatch`` and
    ``env.sh`` say, to which mounts may have been added by hand."""
    missing = mount_problems(run, config)
    if not missing:
        return []
    scripts = f"{RunPaths(run).job_script} and {RunPaths(run).environment_script.name}"
    note = (
        f"that is by config.yaml and this shell, but the job does as {scripts} say, which a resume at the "
        "same size leaves as they are: unless they have the mounts, add them there as well"
    )
    return [*missing, note]


def script_problems(
    slurm: SlurmSection, nodes: int, scripts: dict[str, str], more: Sequence[str] = ()
) -> list[str]:
    """Every reason why Slurm would refuse, or never start, a job with these scripts, by file name.

    ``more`` are problems found before: ``sbatch`` is asked about a job without any.
    """
    problems = [text for name, script in scripts.items() if (text := _syntax(name, script))]
    problems += _partition_problems(slurm, nodes)
    problems += more
    container = slurm.container
    if container.kind != "none" and container.image is None:
        problems.append(f"slurm.container.kind = {container.kind} needs slurm.container.image")
    if not problems:
        problems += _test_only(scripts[JOB_SCRIPT])
    return problems


def slurm_warnings(config: Config, nodes: int) -> list[str]:
    """What may fail but cannot be checked on this machine."""
    warnings = []
    kind = file_system(run_path(config))
    if nodes > 1 and kind in _LOCAL:
        warnings.append(
            f"run.folder is on {kind}, which other nodes rarely see; a run needs a shared file system"
        )
    chosen, hidden = _partitions(config.slurm)
    return [*warnings, *([hidden] if hidden else []), *_core_warnings(config, chosen)]


def _core_warnings(config: Config, partitions: Sequence[str]) -> list[str]:
    """Would a rank share one core with its loader processes? That is Slurm's default."""
    slurm, workers = config.slurm, config.data.workers
    options = {"cpus-per-task", "cpus-per-gpu", "exclusive"} & slurm.sbatch_options.keys()
    if not workers or options or (slurm.cpus_per_task or 1) > 1:
        return []
    by_default = slurm.exclusive or any("DefCpuPerGPU=" in line for line in partitions)
    if slurm.cpus_per_task is None and by_default:
        return []
    given = "is not set, so Slurm gives" if slurm.cpus_per_task is None else "= 1 gives"
    return [
        f"slurm.cpus_per_task {given} each rank one core, which it shares with "
        f"{counted(workers, 'loader process')} (data.workers); better: {workers + 1} or more"
    ]


def minutes(limit: str) -> float | None:
    """Minutes of a Slurm time limit; None for UNLIMITED."""
    return time_limit_seconds(limit) / 60 if re.fullmatch(_TIME_LIMIT, limit) else None


def _partitions(slurm: SlurmSection) -> tuple[list[str], str | None]:
    """What Slurm says about the partitions that the job asks for, one line each; else a warning.

    It shows neither hidden partitions nor those that a plug-in of the site chooses: whether the job can run
    there is for ``sbatch --test-only`` to say.
    """
    text = run_slurm_command("scontrol", "show", "partition", "--oneliner") or ""
    known = {name: line for line in text.splitlines() if (name := field_of(line, "PartitionName"))}
    wanted = slurm.sbatch_options.get("partition") or slurm.partition or os.environ.get("SBATCH_PARTITION")
    if not wanted:
        lines = [line for line in known.values() if field_of(line, "Default") == "YES"]
        return (
            lines,
            None if lines else "slurm.partition is not set, and this cluster shows no default partition",
        )
    names = str(wanted).split(",")
    if any(name not in known for name in names):
        return [], f"partition {wanted}: `scontrol show partition` lists only {', '.join(known)}"
    return [known[name] for name in names], None


def _partition_problems(slurm: SlurmSection, nodes: int) -> list[str]:
    if run_slurm_command("scontrol", "show", "partition", "--oneliner") is None:
        return ["Slurm does not answer here: `scontrol show partition` failed"]
    chosen, _ = _partitions(slurm)
    if not chosen:
        return []
    problems = []
    most = max(int(field_of(line, "TotalNodes") or 0) for line in chosen)
    if nodes > most:
        problems.append(f"--nodes {nodes}: the partition has {most} nodes")
    limits = [minutes(field_of(line, "MaxTime") or "") for line in chosen]
    wanted = minutes(slurm.time_limit) if slurm.time_limit else None
    finite = [limit for limit in limits if limit is not None]
    if wanted is not None and len(finite) == len(limits) and wanted > max(finite):
        problems.append(
            f"slurm.time_limit = {slurm.time_limit}: the partition allows at most {max(finite):g} minutes; "
            "a run may take longer, as it is requeued at the limit"
        )
    return problems


def _lead_problems(slurm: SlurmSection) -> list[str]:
    limit = minutes(slurm.time_limit) if slurm.time_limit else None
    if limit is None or slurm.signal_seconds + 60 < limit * 60:
        return []
    return [
        f"slurm.signal_seconds = {slurm.signal_seconds}: as Slurm may signal up to 60 s early, the ranks "
        f"would be told to save as soon as they start; slurm.time_limit is {slurm.time_limit}"
    ]


def _syntax(name: str, script: str) -> str | None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    return (
        f"{name}: bash cannot parse it (slurm.activate?): {done.stderr.strip()}" if done.returncode else None
    )


def _test_only(script: str) -> list[str]:
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=60,
            env=submission_environment(script),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return [f"sbatch --test-only did not answer: {error}"]
    message = " ".join(line.removeprefix("sbatch: error: ").strip() for line in done.stderr.splitlines())
    return [f"sbatch refuses the job: {message}"] if done.returncode else []
