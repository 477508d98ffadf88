"""What a run is while it trains: its parts on this rank, and what identifies it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from alignkd import __version__
from alignkd.checkpoint.placement import WEIGHTS, weight_digests
from alignkd.checkpoint.resume import CheckpointSearch
from alignkd.config.schema import Config
from alignkd.data.held_out import HeldOut
from alignkd.data.loader import WindowLoader
from alignkd.data.sampler import GlobalBatchSampler
from alignkd.distributed.ranks import Ranks
from alignkd.engine.accuracy import TaskAtEdges
from alignkd.teacher.provider import Teacher


@dataclass(frozen=True)
class RunIdentity:
    """What must not change between a checkpoint and its resume. Part of every checkpoint's manifest."""

    config: dict[str, Any]
    data: str  # fingerprint of data files, tokenizer and templates
    teacher: str | None  # fingerprint of its weights
    frozen: str = ""  # fingerprint of the student's frozen weights and buffers
    images: dict[str, str] = field(default_factory=dict)  # ``data.image_sample``
    layout: dict[str, Any] = field(default_factory=dict)  # of its shards: ``run_folder.layout``


@dataclass(frozen=True)
class TrainingState:
    """One run on this rank, ready to train."""

    run: Path
    config: Config
    ranks: Ranks
    engine: Any  # DeepSpeed engine around a StudentStep
    teacher: Teacher | None
    loader: WindowLoader
    found: CheckpointSearch  # the checkpoint that was loaded, if any
    total_steps: int
    sampler: GlobalBatchSampler
    identity: RunIdentity
    held_out: HeldOut | None = None  # None: no loss terms are evaluated
    task: TaskAtEdges | None = None  # None: no questions are asked

    def position(self, step: int) -> dict[str, Any]:
        """Where ``step`` optimizer steps have brought the run, as columns of a metrics row."""
        samples = self.sampler.samples_before(step)
        return {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": samples / self.sampler.samples_per_epoch,
            "samples": samples,
        }

    def manifest_facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` optimizer steps records of the run. Collective."""
        return {
            **asdict(self.identity),
            "samples": self.sampler.samples_before(step),
            "versions": library_versions(),
            WEIGHTS: weight_digests(self.engine.module, self.ranks),
        }


def library_versions() -> dict[str, str]:
    """Those that decide how a checkpoint is read. A checkout on PYTHONPATH has no metadata of its own."""
    libraries = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"alignkd": __version__, **libraries}
