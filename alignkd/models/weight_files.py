"""Tensors of a model folder, by name, one at a time: safetensors or pickle (``weights_only``), sharded or
not."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from alignkd.errors import CheckpointError
from alignkd.models.json_file import read_json

LAYOUTS = (  # in order of preference: (index file, single file)
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


class WeightFiles:
    """The tensors of one folder. Shapes are known without reading data. One file is open at a time, so
    reading in the order of :meth:`names` opens each file once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _locate(folder)
        self._open_file: Path | None = None
        self._tensors: Any = None

    def names(self) -> list[str]:
        return sorted(self._file_of, key=lambda name: (self._file_of[name], name))

    def shape(self, name: str) -> tuple[int, ...]:
        shard = self._shard(name)
        return (
            tuple(shard[name].shape) if isinstance(shard, dict) else tuple(shard.get_slice(name).get_shape())
        )

    def read(self, name: str) -> torch.Tensor:
        shard = self._shard(name)
        tensor: torch.Tensor = shard[name] if isinstance(shard, dict) else shard.get_tensor(name)
        return tensor

    def _shard(self, name: str) -> Any:
        path = self._file_of[name]
        if path != self._open_file:
            self._tensors, self._open_file = _open(path), path
        return self._tensors


def _locate(folder: Path) -> dict[str, Path]:
    for index_name, single_name in LAYOUTS:
        index = folder / index_name
        if index.is_file():
            return _read_index(index)
        single = folder / single_name
        if single.is_file():
            shard = _open(single)
            return dict.fromkeys(shard if isinstance(shard, dict) else shard.keys(), single)
    expected = ", ".join(name for layout in LAYOUTS for name in layout)
    raise CheckpointError(f"{folder}: no weights; expected one of {expected}")


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no `weight_map`")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{index}: shard {file!r} must be a file name in the same folder")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: shard {file} is missing")
    listed = {name: index.parent / file for name, file in weight_map.items()}
    for path in sorted(set(listed.values())):
        shard = _open(path)
        held = set(shard if isinstance(shard, dict) else shard.keys())
        lost = sorted(name for name, file in listed.items() if file == path and name not in held)
        if lost:
            raise CheckpointError(
                f"{path}: does not hold {len(lost)} of the tensors that the index names, e.g. {lost[0]}"
            )
    return listed


def _open(path: Path) -> Any:
    """A dict of memory-mapped tensors, or an open safetensors file."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        loaded = _unpickle(path)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load such a file without the check.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: not loaded, because it is damaged or holds something other than tensors"
            + (f" ({found[1]})" if found else "")
            + "; unpickling that could run code. Valid: a state dict of tensors, or safetensors"
        ) from None
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as weights ({reason})") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise CheckpointError(f"{path}: holds something other than named tensors")
    return loaded


def _unpickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return torch.load(path, map_location="cpu", weights_only=True)  # the old format cannot be mapped
