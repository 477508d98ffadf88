"""The folder of a teacher's cache, and what makes its parts count. Without torch.

| name | written by | what it is |
|---|---|---|
| config.yaml | ``alignkd cache`` | the configuration that the ranks read |
| index.bin | rank 0 | where each sample lies and how long it is: ``alignkd.data.index_file`` |
| identity.json | rank 0, before any shard | what the cache is of: :class:`Identity` |
| shards/N.safetensors | one rank | what is stored of consecutive samples: ``alignkd.teacher.cache_shards`` |
| shards/N.json | the same rank, after it | size and sha256 of that file: :class:`Shard` |
| manifest.json | rank 0, last | the identity and all shards: only a cache that has it is read |
| logs/ | ranks | one log per rank |
| .lock | ``alignkd cache`` | empty; locked while it runs the ranks, or submits |
| job.sbatch, env.sh | ``alignkd cache --nodes`` | the scripts of the Slurm job |

Every file is flushed before it gets its name, and a shard counts once its record is there. So a kill at any
moment leaves shards that count, and leftovers that the next start writes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json
from alignkd.run_folder.paths import RunPaths

FORMAT = 3
SHARD_SAMPLES = 128  # of a 7B teacher: about half a gigabyte, which its rank holds in host memory


@dataclass(frozen=True)
class CachePaths:
    """Paths in the cache ``folder``; files that a run has, too, have the same names. Nothing is read or
    created."""

    folder: Path

    @property
    def config(self) -> Path:
        return RunPaths(self.folder).config

    @property
    def index(self) -> Path:
        return RunPaths(self.folder).index

    @property
    def logs(self) -> Path:
        return RunPaths(self.folder).logs

    @property
    def identity(self) -> Path:
        return self.folder / "identity.json"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def lock(self) -> Path:
        return RunPaths(self.folder).launcher_lock

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def shard(self, number: int) -> Path:
        return self.shards / f"{number:05}.safetensors"

    def record(self, number: int) -> Path:
        return self.shards / f"{number:05}.json"


@dataclass(frozen=True)
class Identity:
    """What a cache is of. Two caches with the same identity hold the same bytes on the same kind of device,
    whatever number of ranks wrote them."""

    key: dict[str, str]  # ``teacher_cache.key``
    images: tuple[tuple[int, str], ...]  # (source, path) of the images whose contents are part of the key
    weights: str  # ``models.loading.fingerprint`` of the teacher
    width: int  # D, of a hidden state
    samples: int  # of the index
    shard_samples: int
    entries: str  # ``Index.entries_hash``: which entry each sample number means
    form: str  # ``teacher.cache_form``
    top_k: int  # tokens stored of a position; 0 in the other forms

    @property
    def digest(self) -> str:
        """16 hex digits of all this, part of each sample's checksum."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shard_count(self) -> int:
        return -(-self.samples // self.shard_samples)

    def samples_of(self, shard: int) -> range:
        start = shard * self.shard_samples
        return range(start, min(start + self.shard_samples, self.samples))

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "images": [list(image) for image in self.images]}


@dataclass(frozen=True)
class Shard:
    """A file of consecutive samples as it was written."""

    positions: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    identity: Identity
    shards: tuple[Shard, ...]

    @property
    def positions(self) -> int:
        return sum(shard.positions for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def as_json(self) -> dict[str, Any]:
        return {**self.identity.as_json(), "shards": [asdict(shard) for shard in self.shards]}


def read_identity(folder: Path) -> Identity | None:
    """None where no cache was begun. Raises UserError for a damaged file."""
    path = CachePaths(folder).identity
    return _identity(_object(path), path) if path.exists() else None


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where there is no finished cache."""
    path = CachePaths(folder).manifest
    if not path.exists():
        begun = CachePaths(folder).identity.exists()
        state = "was begun but is not finished" if begun else "does not exist"
        raise UserError(f"{folder}: this cache of the teacher {state}; `alignkd cache CONFIG` writes it")
    found = _object(path)
    try:
        shards = tuple(Shard(**shard) for shard in found.pop("shards"))
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    manifest = Manifest(_identity(found, path), shards)
    if len(shards) != manifest.identity.shard_count:
        raise _damaged(path, f"{len(shards)} shards instead of {manifest.identity.shard_count}")
    return manifest


def read_record(folder: Path, shard: int) -> Shard | None:
    """The record of a shard that counts: its file is there and has its size. None otherwise."""
    paths = CachePaths(folder)
    try:
        record = Shard(**(read_json(paths.record(shard)) or {}))
        return record if paths.shard(shard).stat().st_size == record.bytes else None
    except (TypeError, OSError):
        return None


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Shards that are missing or have another size. Their contents are not read."""
    problems = []
    for number, shard in enumerate(manifest.shards):
        path = CachePaths(folder).shard(number)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            problems.append(f"{path} {state}")
    return problems


def hash_problem(folder: Path, number: int, shard: Shard) -> str | None:
    """Why a shard is not what was written; None when it is. Reads all of it."""
    path = CachePaths(folder).shard(number)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == shard.sha256 else f"{path} has another sha256 than when it was written"


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if found is None:
        raise _damaged(path, "not a JSON object")
    return found


def _identity(found: Mapping[str, Any], path: Path) -> Identity:
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {found.get('format')!r}, this version reads {FORMAT}; remove the folder and "
            "write the cache anew"
        )
    try:
        values = {name: value for name, value in found.items() if name != "format"}
        images = tuple((int(source), str(name)) for source, name in values.pop("images"))
        return Identity(images=images, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path}: damaged ({why}); remove the folder and write the cache anew")
