"""Fixture models (fixtures/mobilevlm_v2_tiny/SOURCE.md), batches of their samples, and run folders."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from alignkd.config import Config, dump_config, load_config
from alignkd.data.batch import Batch
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.images import ImageProcessor
from alignkd.data.records import parse_sample
from alignkd.data.templates import encode
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.models.adapters import AlignmentAdapters
from alignkd.models.configuration import read_model_config
from alignkd.run_folder.paths import RunPaths
from launcher.render.deepspeed import student_config, teacher_config

FOLDER = Path(__file__).parent / "fixtures" / "mobilevlm_v2_tiny"
TEACHER, STUDENT = FOLDER / "teacher", FOLDER / "student"
CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text())
EXPECTED_LOSSES: dict[str, Any] = json.loads((FOLDER / "expected_losses.json").read_text())


@functools.cache
def expected() -> Any:
    return np.load(FOLDER / "expected.npz")


@functools.cache
def example(case: str) -> Example:
    record = parse_sample(CASES[case]["record"], "cases.json", 0, 0)
    encoded = encode(record.turns, CASES[case]["template"], SentencePieceTokenizer.from_folder(STUDENT))
    processor = ImageProcessor(read_model_config(STUDENT).preprocessor_config, 10**8)
    images = tuple(processor.read(FOLDER, path, "pad") for path in record.images)
    return Example(encoded.ids, encoded.labels, images)


def batch_of(*cases: str, **settings: Any) -> Batch:
    """The named cases in this order as one batch; without a case, the batch that has no sample."""
    return collate([example(case) for case in cases], CollateSettings(144, (3, 336, 336), **settings))


def fixture_adapters() -> AlignmentAdapters:
    adapters = AlignmentAdapters(read_model_config(TEACHER), read_model_config(STUDENT))
    values = expected()
    adapters.load_state_dict(
        {
            "attention.weight": torch.from_numpy(values["attn_adapter_weight"][:, :, 0, 0]),
            "attention.bias": torch.from_numpy(values["attn_adapter_bias"]),
            "vision.weight": torch.from_numpy(values["proj_adapter_weight"][:, :, 0]),
            "vision.bias": torch.from_numpy(values["proj_adapter_bias"]),
        }
    )
    return adapters


def write_run(folder: Path, world_size: int, **changes: Any) -> Path:
    """A run folder as the launcher writes it, on a few repetitions of the fixture's cases.

    ``changes`` are configuration keys with ``__`` for the dot: ``training__precision="fp32"``.
    """
    folder.mkdir(parents=True)
    records = {
        "v1": [CASES[name]["record"] for name in ("v1", "rounds", "text")],
        "plain": [CASES["plain"]["record"]],
    }
    for template, of_template in records.items():
        repeated = [dict(record, id=f"{record['id']}-{turn}") for turn in range(8) for record in of_template]
        (folder / f"{template}.json").write_text(json.dumps(repeated))
    document = {
        "run": {"name": folder.name, "folder": str(folder.parent)},
        "model": {"teacher": str(TEACHER), "student": str(STUDENT)},
        "data": {
            "sources": [
                {"file": str(folder / f"{template}.json"), "template": template, "image_folder": str(FOLDER)}
                for template in records
            ],
            "workers": 0,
        },
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every": 2},
    }
    (folder / "source.yaml").write_text(yaml.safe_dump(document))
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return write_run_of(load_config(folder / "source.yaml", overrides), folder, world_size)


def write_run_of(config: Config, folder: Path, world_size: int) -> Path:
    """Complete a run folder from its configuration."""
    RunPaths(folder).config.write_text(dump_config(config))
    RunPaths(folder).deepspeed.mkdir()
    RunPaths(folder).student_deepspeed.write_text(json.dumps(student_config(config, world_size, "cpu")))
    teacher = teacher_config(config, "cpu")
    if teacher is not None:
        RunPaths(folder).teacher_deepspeed.write_text(json.dumps(teacher))
    return folder


def resize_run(run: Path, world_size: int, **changes: Any) -> None:
    """Change a run folder as `alignkd resume --nodes` does; ``changes`` are what a user has edited."""
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    config = load_config(RunPaths(run).config, overrides)
    RunPaths(run).config.write_text(dump_config(config))
    RunPaths(run).student_deepspeed.write_text(json.dumps(student_config(config, world_size, "cpu")))


# Columns of a metrics row that differ between two equal runs.
TIMES = frozenset(
    (
        "step_seconds",
        "tokens_per_second",
        "samples_per_second",
        "teacher_seconds_share",
        "student_seconds_share",
        "optimizer_seconds_share",
        "data_wait_share",
        "memory_bytes",
    )
)


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunPaths(run).metrics.read_text().splitlines()]


def copy_untrained(run: Path, out: Path) -> None:
    """A finished run's folder as it was before its first start."""
    shutil.copytree(run, out)
    for name in ("metrics.jsonl", "result.json", "progress.json"):
        (out / name).unlink()
    for name in ("checkpoints", "student"):
        shutil.rmtree(out / name)
