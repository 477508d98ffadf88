"""What DeepSpeed does not save of a rank: its random states. JSON, never pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def rank_state() -> dict[str, Any]:
    """The current random states."""
    version, numbers, gaussian = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {
        "key": numpy_state["state"]["key"].tolist(),
        "pos": int(numpy_state["state"]["pos"]),
    }
    described: dict[str, Any] = {
        "python": [version, list(numbers), gaussian],
        "numpy": numpy_state,
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if get_accelerator().device_name() != "cpu":
        described["device"] = get_accelerator().get_rng_state().cpu().numpy().tobytes().hex()
    return described


def write_rank_state(folder: Path, rank: int, described: dict[str, Any]) -> Path:
    path = _path(folder, rank)
    path.write_text(json.dumps(described), encoding="utf-8")
    return path


def load_rank_state(folder: Path, rank: int) -> None:
    described = json.loads(_path(folder, rank).read_text(encoding="utf-8"))
    version, numbers, gaussian = described["python"]
    random.setstate((version, tuple(numbers), gaussian))
    numpy_state = described["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(_tensor(described["torch"]))
    if "device" in described and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(_tensor(described["device"]))


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Random states as a function of seed, step and rank, where the checkpoint has those of another number of
    ranks. (Nothing draws from them today: there is no dropout, and the data order has a source of its own.)
    """
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(drawn[0]))
    np.random.seed(int(drawn[1]))
    torch.manual_seed(int(drawn[2]))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank}.json"


def _tensor(hexadecimal: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(hexadecimal), dtype=torch.uint8)
