from __future__ import annotations

import collections
import copy
import io
from pathlib import Path

import pytest
import torch

from alignkd.checkpoint import host_copy as module
from alignkd.checkpoint.host_copy import free_host_bytes, host_copy
from alignkd.checkpoint.shard_files import ShardFiles


def state() -> dict:
    """As an engine's: views of one flat buffer, a module's state dict, numbers, an object."""
    flat = torch.arange(1000.0)
    weights = torch.nn.Linear(3, 2).state_dict()
    return {
        "module": weights,
        "groups": [flat[:400], (flat[400:].view(20, 30), None)],
        "moments": {0: {"step": torch.tensor(3), "exp_avg": flat.clone()}},
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "shape": torch.Size([2, 3]),
        "scaler": collections.Counter(overflow=2),
    }


def size_on_disk(value: object) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return len(buffer.getvalue())


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_a_copy_stays_the_same_while_training_continues() -> None:
    original = state()
    before = copy.deepcopy(original)
    copied = host_copy(original)
    original["groups"][0].mul_(-1)
    original["module"]["weight"].zero_()
    original["moments"][0]["step"].add_(1)
    original["moments"][1] = {}
    original["scaler"]["overflow"] += 1
    assert equal(copied, before)
    assert not equal(original, before)
    assert type(copied["parameter"]) is torch.nn.Parameter
    assert copied["module"]._metadata == original["module"]._metadata


def test_a_shared_storage_is_copied_once_and_shared_again() -> None:
    original = state()
    copied = host_copy(original)
    first, (second, _) = copied["groups"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() != original["groups"][0].untyped_storage().data_ptr()
    first[0] = 7.0
    assert original["groups"][0][0] == 0.0
    assert abs(size_on_disk(copied) - size_on_disk(original)) < 200


Pair = collections.namedtuple("Pair", ["moment", "step"])


class Holder:
    def __init__(self) -> None:
        self.moment = torch.ones(3)


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [Pair(torch.ones(3), 1), Holder(), {"a": [Special(torch.ones(3))]}, torch.eye(3).to_sparse()],
    ids=["namedtuple", "object", "subclass", "sparse"],
)
def test_a_state_of_an_unknown_kind_is_written_at_once(tmp_path: Path, value: object) -> None:
    with pytest.raises(RuntimeError):
        host_copy({"state": value})
    files = ShardFiles()
    files.begin(copies=True)
    files.save({"state": value}, str(tmp_path / "shard.pt"))
    assert (files.waiting, files.written, files.problem) == ([], [tmp_path / "shard.pt"], None)
    assert torch.load(tmp_path / "shard.pt", weights_only=False).keys() == {"state"}


def test_without_host_memory_a_file_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_host_bytes", lambda: 1_000)
    with pytest.raises(OSError, match="1,000 bytes of host memory free, the copies take"):
        host_copy(state())
    files = ShardFiles()
    files.begin(copies=True)
    files.save(state(), str(tmp_path / "shard.pt"))
    assert files.problem is None
    assert files.waiting == []
    assert files.written == [tmp_path / "shard.pt"]
    monkeypatch.undo()
    files.begin(copies=True)
    files.save(state(), str(tmp_path / "later.pt"))
    assert [path for path, _ in files.waiting] == [tmp_path / "later.pt"]
    assert not (tmp_path / "later.pt").exists()


def test_the_room_for_all_ranks_of_the_host_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(storage.nbytes() for storage in module._storages(state()))
    monkeypatch.setattr(module, "free_host_bytes", lambda: 2 * needed)
    host_copy(state())
    with pytest.raises(OSError, match="host memory"):
        host_copy(state(), copies=4)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("mp_rank_00_model_states.pt", True),  # stages 0, 1 and 2: rank 0 alone
        ("zero_pp_rank_3_mp_rank_00_model_states.pt", False),  # stage 3
        ("zero_pp_rank_3_mp_rank_00_optim_states.pt", False),
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", False),
    ],
)
def test_room_is_asked_for_all_ranks_of_the_host_except_for_the_file_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fits: bool
) -> None:
    needed = sum(storage.nbytes() for storage in module._storages(state()))
    monkeypatch.setattr(module, "free_host_bytes", lambda: 2 * needed)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    files = ShardFiles()
    files.begin(copies=True)
    files.save(state(), str(tmp_path / name))
    assert [path.name for path, _ in files.waiting] == ([name] if fits else [])
    assert [path.name for path in files.written] == ([] if fits else [name])


def test_free_memory_is_at_most_what_the_machine_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < free_host_bytes() <= int(total.split()[1]) * 1024


def test_a_control_group_limits_free_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 50000\n")
    assert module._free_in_group(tmp_path, 10**9) == 350000
    (tmp_path / "memory.max").write_text("max\n")
    assert module._free_in_group(tmp_path, 10**9) == 10**9
    assert module._free_in_group(tmp_path / "none", 5) == 5


def test_a_control_group_of_version_1_limits_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONTROL_GROUPS", tmp_path)
    job = tmp_path / "memory" / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("1000000\n")
    (job / "memory.usage_in_bytes").write_text("700000\n")
    (job / "memory.stat").write_text("inactive_file 0\ntotal_inactive_file 50000\n")
    memberships = "9:cpu,cpuacct:/slurm/job_7/step_0\n5:memory:/slurm/job_7/step_0\n0::/unified\n"
    folders = list(module._control_groups(memberships))
    memory = tmp_path / "memory"
    assert folders == [job / "step_0", job, job.parent, memory, tmp_path / "unified", tmp_path]
    assert min(module._free_in_group(folder, 10**9) for folder in folders) == 350000


def test_pinned_copies_take_powers_of_two_less_what_torch_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    storages = [torch.empty(1000, dtype=torch.uint8, device="meta").untyped_storage() for _ in range(2)]
    storages += [torch.empty(10, dtype=torch.uint8).untyped_storage(), torch.empty(0).untyped_storage()]
    assert module._bytes_to_take(storages) == 2 * 1024 + 10
    monkeypatch.setattr(module, "_idle_pinned_bytes", lambda: 1024)
    assert module._bytes_to_take(storages) == 1024 + 10
    monkeypatch.setattr(module, "_idle_pinned_bytes", lambda: 10**6)
    assert module._bytes_to_take(storages) == 10
