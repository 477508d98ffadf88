"""Reading a cache: samples in any order, and every kind of damage found before it reaches a loss."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.data.batch import Batch, TermCounts
from alignkd.errors import CheckpointError
from alignkd.teacher.cache_forms import FORMS, from_fp8, to_fp8
from alignkd.teacher.cache_shards import CachedAnswers, checksum, write_shard
from alignkd.teacher.cache_top_k import TeacherHead
from alignkd.teacher_cache.folder import FORMAT, CachePaths, Identity, hash_problem, read_record
from tests import tiny

POSITIONS = (3, 0, 2, 4)  # of samples 0 to 3; the second was a bad one
WIDTH = 8
HEAD = TeacherHead(
    torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16), 3, 2.0
)


def hidden_of(sample: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(POSITIONS[sample], WIDTH, generator=torch.Generator().manual_seed(sample)).to(dtype)


def new_cache(folder: Path, precision: str = "bf16", form: str = "exact", weights: str = "") -> CachedAnswers:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    top_k = HEAD.top_k if form == "top_k" else 0
    key = {"precision": precision, "form": form}
    identity = Identity(key, (), weights, WIDTH, 4, 2, "", form, top_k)
    CachePaths(folder).shards.mkdir(parents=True)
    for shard in (0, 1):
        samples = (2 * shard, 2 * shard + 1)
        answers = [FORMS[form].encode(hidden_of(sample, dtype), HEAD) for sample in samples]
        write_shard(folder, identity, shard, answers)
    return CachedAnswers(folder, identity)


def filled(cache: CachedAnswers, samples: Sequence[int], positions: int) -> Batch:
    """A batch of ``samples`` with so many logit positions."""
    return cache(replace(tiny.batch_of(), counts=TermCounts(logits=positions)), samples)


def read(cache: CachedAnswers, samples: Sequence[int], positions: int) -> torch.Tensor:
    hidden_ND = filled(cache, samples, positions).teacher_hidden_ND
    assert hidden_ND is not None
    return hidden_ND


@pytest.mark.parametrize("form", ["exact", "fp8"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_samples_come_in_the_order_asked_for_and_in_the_teachers_precision(
    tmp_path: Path, precision: str, dtype: torch.dtype, form: str
) -> None:
    cache = pickle.loads(pickle.dumps(new_cache(tmp_path / "cache", precision, form)))  # as a worker gets it
    for samples in ([3, 0], [1], [], [2, 3, 0, 1]):
        found = read(cache, samples, sum(POSITIONS[sample] for sample in samples))
        expected = [hidden_of(sample, dtype) for sample in samples]
        if form == "fp8":
            expected = [from_fp8(to_fp8(hidden), dtype) for hidden in expected]
        assert found.dtype == dtype
        assert found.shape == (sum(map(len, expected)), WIDTH)
        assert found.equal(torch.cat([found[:0], *expected]))


def test_the_most_likely_tokens_come_in_the_order_of_the_samples_asked_for(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(new_cache(tmp_path / "cache", form="top_k")))
    for samples in ([3, 0], [1], [2, 3, 0, 1]):
        batch = filled(cache, samples, sum(POSITIONS[sample] for sample in samples))
        hidden_ND = torch.cat([hidden_of(sample, torch.bfloat16) for sample in samples])
        logits_NW = (hidden_ND @ HEAD.weight_WD.to(torch.bfloat16).T).float() / HEAD.temperature
        p_NW = logits_NW.softmax(-1)
        assert batch.teacher_hidden_ND is None
        assert batch.teacher_tokens_NK is not None
        assert batch.teacher_log_probs_NR is not None
        assert batch.teacher_tokens_NK.dtype == torch.int32
        assert batch.teacher_tokens_NK.shape == (len(hidden_ND), 3)
        kept_NK = p_NW.gather(1, batch.teacher_tokens_NK.long())
        assert kept_NK.equal(p_NW.sort(dim=-1, descending=True).values[:, :3])
        expected_NR = torch.cat([kept_NK, 1 - kept_NK.sum(dim=-1, keepdim=True)], dim=-1).log()
        assert batch.teacher_log_probs_NR.dtype == torch.float16
        torch.testing.assert_close(batch.teacher_log_probs_NR.float(), expected_NR, rtol=2**-11, atol=1e-5)


def flip(place: int) -> Callable[[Path], None]:
    """One bit of the byte at a share of the file's data."""

    def change(folder: Path) -> None:
        path = CachePaths(folder).shard(1)
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(content)

    return change


def swap(folder: Path) -> None:
    first, second = CachePaths(folder).shard(0), CachePaths(folder).shard(1)
    first.rename(folder / "first")
    second.rename(first)
    (folder / "first").rename(second)


@pytest.mark.parametrize(
    ("form", "row_bytes"), [("exact", 2 * WIDTH), ("fp8", WIDTH + 4), ("top_k", 3 * 4 + 4 * 2)]
)
def test_every_flipped_bit_of_the_data_is_found(tmp_path: Path, form: str, row_bytes: int) -> None:
    cache = tmp_path / "cache"
    identity = new_cache(cache, form=form)._identity
    size = CachePaths(cache).shard(1).stat().st_size
    header = 8 + int.from_bytes(CachePaths(cache).shard(1).read_bytes()[:8], "little")
    record = read_record(cache, 1)
    assert record is not None
    assert hash_problem(cache, 1, record) is None
    assert size == header + row_bytes * sum(POSITIONS[2:]) + 8 * (3 + 2)  # and offsets and checksums
    for place in range(header, size):
        damaged = tmp_path / "damaged"
        shutil.copytree(cache, damaged)
        flip(place)(damaged)
        with pytest.raises(CheckpointError):  # offsets and checksums are data, too
            filled(CachedAnswers(damaged, identity), [2, 3], 6)
        assert "has another sha256" in str(hash_problem(damaged, 1, record))
        shutil.rmtree(damaged)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip(-1), "00001.safetensors: sample [23] is not what was written; remove the file"),
        (swap, "00001.safetensors: sample 2 is not what was written"),
        (lambda folder: CachePaths(folder).shard(1).unlink(), "00001.safetensors: sample 2 cannot be read"),
        (flip(0), "00001.safetensors: sample 2 cannot be read"),
        (flip(20), "00001.safetensors: sample 2 cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    cache = new_cache(tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=message):
        read(cache, [2, 3], 6)


@pytest.mark.parametrize(
    ("form", "foreign", "why"),
    [
        ("exact", {"precision": "fp32"}, r"hidden: rows are float32 \[8\] instead of bfloat16 \[8\]"),
        ("exact", {"form": "fp8"}, r"hidden: rows are float8_e4m3fn \[8\] instead of bfloat16 \[8\]"),
        ("fp8", {"form": "exact"}, "does not contain tensor scales"),
        ("top_k", {"form": "exact"}, "does not contain tensor tokens"),
    ],
)
def test_a_shard_of_another_form_or_precision_is_named(
    tmp_path: Path, form: str, foreign: dict[str, str], why: str
) -> None:
    cache = new_cache(tmp_path / "cache", form=form)
    put_shard_of(tmp_path / "foreign", tmp_path / "cache", **foreign)
    with pytest.raises(CheckpointError, match=f"00001.safetensors: sample 2 cannot be read.*{why}"):
        filled(cache, [2, 3], 6)


def put_shard_of(foreign: Path, cache: Path, **settings: str) -> None:
    new_cache(foreign, **settings)
    shutil.copy(CachePaths(foreign).shard(1), CachePaths(cache).shard(1))


@pytest.mark.parametrize("changes", [{"width": WIDTH + 1}, {"top_k": 2, "form": "top_k"}])
def test_a_shard_of_another_width_or_number_of_tokens_is_named(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cache = new_cache(tmp_path / "cache", form=changes.get("form", "exact"))
    with pytest.raises(CheckpointError, match=r"00001.safetensors: sample 2 cannot be read \(.*: rows are"):
        filled(CachedAnswers(tmp_path / "cache", replace(cache._identity, **changes)), [2, 3], 6)


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_of_the_same_sizes_from_another_teacher_is_found_at_every_sample(
    tmp_path: Path, form: str
) -> None:
    cache = new_cache(tmp_path / "cache", form=form)
    put_shard_of(tmp_path / "same", tmp_path / "cache", form=form)
    filled(cache, [2, 3], 6)
    foreign = new_cache(tmp_path / "foreign", form=form, weights="another")
    for sample, positions in enumerate(POSITIONS):
        filled(foreign, [sample], positions)
        with pytest.raises(CheckpointError, match=f"sample {sample} is not what was written"):
            filled(CachedAnswers(tmp_path / "foreign", cache._identity), [sample], positions)


def test_a_digest_is_of_the_whole_identity_but_not_of_the_order_of_its_key(tmp_path: Path) -> None:
    identity = new_cache(tmp_path / "cache")._identity
    reordered = dict(reversed(identity.key.items()))
    assert replace(identity, key=reordered).digest == identity.digest
    others = [
        replace(identity, weights="another"),
        replace(identity, entries="others"),
        replace(identity, key=identity.key | {"form": "top_k, 3"}),
    ]
    assert len({identity.digest, *(other.digest for other in others)}) == 4


def test_checksums_are_those_that_caches_of_this_format_have() -> None:
    """Whoever changes them must change FORMAT, or every file of older caches would look damaged."""
    identity = Identity({"form": "exact"}, ((0, "a.jpg"),), "weights", 8, 4, 2, "entries", "exact", 0)
    assert (FORMAT, identity.digest) == (3, "33a3328b7a6f8f12")
    assert checksum({"hidden": torch.arange(6.0).reshape(2, 3)}, 1, identity.digest) == 1010098411


def test_samples_with_another_number_of_positions_are_refused(tmp_path: Path) -> None:
    cache = new_cache(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"samples \[0, 1\] have 4 positions, in the teacher's cache 3"):
        read(cache, [0, 1], 4)
