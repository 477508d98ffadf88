"""What DeepSpeed does not save of a rank: its random states. JSON and safetensors, never pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file


def save_rank_state(folder: Path, rank: int) -> None:
    version, numbers, gaussian = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {
        "key": numpy_state["state"]["key"].tolist(),
        "pos": int(numpy_state["state"]["pos"]),
    }
    described = {"python": [version, list(numbers), gaussian], "numpy": numpy_state}
    (folder / f"random-{rank}.json").write_text(json.dumps(described), encoding="utf-8")
    tensors = {"torch": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        tensors["device"] = get_accelerator().get_rng_state().cpu()
    save_file(tensors, folder / f"random-{rank}.safetensors")


def load_rank_state(folder: Path, rank: int) -> None:
    described = json.loads((folder / f"random-{rank}.json").read_text(encoding="utf-8"))
    version, numbers, gaussian = described["python"]
    random.setstate((version, tuple(numbers), gaussian))
    numpy_state = described["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    tensors = load_file(folder / f"random-{rank}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(tensors["device"])
