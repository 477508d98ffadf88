"""Tensors on disk in every layout, and files that must not be trusted."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.errors import CheckpointError
from alignkd.models.weight_files import WeightFiles
from tests.model_folders import LAYOUTS, write_weights

TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.b": torch.ones(4, dtype=torch.bfloat16),
    "lm_head.weight": torch.zeros(2, 2),
}


class Attack:
    """Creates a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(tmp_path: Path, layout: str) -> None:
    write_weights(tmp_path, TENSORS, layout)
    files = WeightFiles(tmp_path)
    assert set(files.names()) == set(TENSORS)
    for name in files.names():
        assert files.shape(name) == tuple(TENSORS[name].shape)
        assert files.read(name).dtype == TENSORS[name].dtype
        assert torch.equal(files.read(name), TENSORS[name])


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_reading_in_order_opens_every_shard_once(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignkd.models import weight_files

    write_weights(tmp_path, {f"t{number}": torch.ones(2) for number in range(10)}, layout)
    files = WeightFiles(tmp_path)
    opened, real = [], weight_files._open
    monkeypatch.setattr(weight_files, "_open", lambda path: opened.append(path) or real(path))
    for name in files.names():
        files.read(name)
    assert len(opened) == 2


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.ones(1)}, "bin")
    write_weights(tmp_path, {"a": torch.zeros(1)}, "safetensors")
    assert WeightFiles(tmp_path).read("a").item() == 0.0


def test_a_folder_without_weights_lists_the_valid_file_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        assert name in str(caught.value)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_runs_code_is_not_executed(tmp_path: Path, old_format: bool) -> None:
    proof, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    torch.save({"a": Attack(proof)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(
        CheckpointError, match=r"holds something other than tensors \(posix.mkdir\)"
    ) as caught:
        WeightFiles(tmp_path)
    assert not proof.exists()
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to load it without the check
    pickle.loads(pickle.dumps(Attack(proof)))
    assert proof.exists(), "the attack works where nothing guards"


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(proof), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
        WeightFiles(tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": 1}, {1: torch.ones(2)}])
def test_a_pickle_must_hold_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something other than named tensors"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin"])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, layout: str) -> None:
    write_weights(tmp_path, TENSORS, layout)
    path = next(tmp_path.iterdir())
    whole = path.read_bytes()
    for size in [*range(0, 64, 7), *range(64, len(whole) - 1, max(len(whole) // 40, 1))]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=path.name):
            WeightFiles(tmp_path)


def test_damaged_bytes_are_at_worst_a_clear_error(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, "old bin")
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            WeightFiles(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "file", ["../secret.bin", "/etc/passwd", "sub/part.bin", "..", "", 7, None, ["pytorch_model.bin"]]
)
def test_an_index_may_not_leave_its_folder(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.bin", folder / "sub" / "part.bin"):
        torch.save({"a": torch.ones(1)}, path)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="must be a file name in the same folder"):
        WeightFiles(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        WeightFiles(tmp_path)


def test_a_lost_shard_and_a_lost_tensor_are_named(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, "sharded safetensors")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = listed["weight_map"]["model.b"]
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "model.lost": shard}}))
    with pytest.raises(
        CheckpointError, match=r"does not hold 1 of the tensors that the index names, e.g. model.lost"
    ):
        WeightFiles(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard} is missing"):
        WeightFiles(tmp_path)
