"""What the ranks of a job see inside a container: do its mounts hold all that they read and write?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.config.slurm_section import SlurmSection

# apptainer adds the mounts of these variables, which a job inherits from the shell that submits it.
_BIND_VARIABLES = ("APPTAINER_BIND", "APPTAINER_BINDPATH", "SINGULARITY_BIND", "SINGULARITY_BINDPATH")


@dataclass(frozen=True)
class _Mount:
    source: Path  # on the node
    target: Path  # in the container


def container_problems(
    slurm: SlurmSection, places: Mapping[str, Path], environment: Mapping[str, str] = os.environ
) -> list[str]:
    """A line for each of ``places`` (absolute paths by key) that the ranks would not find at its own path.

    Empty where the ranks run in no container.
    """
    mounts = _mounts(slurm, environment)
    if mounts is None:
        return []
    return [
        f"{key} = {path}: no mount of the container shows it there; add FOLDER:FOLDER, for a folder "
        "that holds it, to slurm.container.mounts"
        for key, path in places.items()
        if not _shows(mounts, path)
    ]


def _mounts(slurm: SlurmSection, environment: Mapping[str, str]) -> list[_Mount] | None:
    """None without a container."""
    options, kind = slurm.srun_options, slurm.container.kind
    if not (options.get("container-image") if kind == "none" else slurm.container.image):
        return None
    home = _mount(str(Path.home()))
    if kind == "apptainer":
        bound = [({**environment, **slurm.export}).get(name, "") for name in _BIND_VARIABLES]
        # The first two are apptainer's default.
        return [home, *_mounts_in("/tmp", *slurm.container.mounts, *bound)]
    given = list(slurm.container.mounts) if kind == "pyxis" else []
    if "container-mounts" in options:
        given = [str(options["container-mounts"] or "")]
    return [*_mounts_in(*given), *([home] if options.get("container-mount-home") else [])]


def _mounts_in(*lists: str) -> list[_Mount]:
    """Each list is of mounts with commas between them, which pyxis and apptainer accept everywhere."""
    return [_mount(text) for given in lists for text in given.split(",") if text]


def _mount(text: str) -> _Mount:
    """``SOURCE[:TARGET[:OPTIONS]]``."""
    source, target = [*text.split(":"), ""][:2]
    return _Mount(Path(source), Path(target or source))


def _shows(mounts: Sequence[_Mount], path: Path) -> bool:
    """Is the node's ``path`` at the same path in the container?"""
    holding = [mount for mount in mounts if path.is_relative_to(mount.target)]
    if not holding:
        return False
    mount = max(holding, key=lambda mount: len(mount.target.parts))
    shown = os.path.realpath(mount.source / path.relative_to(mount.target))
    if shown != os.path.realpath(path):
        return False  # something else is mounted there
    if Path(shown).is_relative_to(os.path.realpath(mount.source)):
        return True
    # A link leads out of the mount, so its end must be in the container, too.
    return shown != str(path) and _shows(mounts, Path(shown))
