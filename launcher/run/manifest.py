"""``manifest.json``: what a run consists of: its size, versions, commit and data. Read by most commands."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths

if TYPE_CHECKING:
    from alignkd.config import Config

PACKAGES = ("alignkd", "torch", "deepspeed", "transformers", "sentencepiece", "safetensors", "numpy")


@dataclass(frozen=True)
class Manifest:
    """``device`` is "cpu", or "auto" for one GPU per rank; ``data`` maps each data file to its sha256."""

    created: str  # ISO 8601, UTC
    nodes: int
    gpus_per_node: int
    world_size: int
    accumulation_steps: int
    backend: str
    device: str
    versions: dict[str, str]
    git_commit: str | None
    data: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_manifest(
    config: Config, nodes: int, gpus_per_node: int, accumulation_steps: int, backend: str, device: str
) -> Manifest:
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        world_size=nodes * gpus_per_node,
        accumulation_steps=accumulation_steps,
        backend=backend,
        device=device,
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        git_commit=git_commit(Path(__file__).resolve().parents[2]),
        data={source.file: file_hash(Path(source.file)) for source in config.named_sources().values()},
    )


def read_manifest(run: Path) -> Manifest:
    """Raises UserError when ``run`` is not a run folder."""
    values = read_json(RunPaths(run).manifest)
    try:
        return Manifest(**values) if values is not None else _not_a_run(run)
    except TypeError:
        return _not_a_run(run)


def _not_a_run(run: Path) -> Manifest:
    raise UserError(
        f"{run}: not a run folder (no valid manifest.json); name one that `alignkd launch` created"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_commit(checkout: Path) -> str | None:
    """The commit of ``checkout``, with `-dirty` for local changes; None outside a git checkout."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def file_hash(path: Path) -> str:
    """sha256 of a file. Raises UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
