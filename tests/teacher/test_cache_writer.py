"""Writing a cache of the teacher: the same bytes on any number of ranks and after any kill."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkd.config import load_config
from alignkd.data.index import ARRAYS, Index
from alignkd.data.index_file import read_index
from alignkd.data.json_list import JsonListFile
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import _cache_identity
from alignkd.errors import FileSystemError, UserError
from alignkd.models.building import BuildOptions
from alignkd.models.loading import fingerprint, load_model
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.patience import Patience
from alignkd.teacher import cache_writer
from alignkd.teacher.cache_forms import to_fp8
from alignkd.teacher.cache_writer import _finish
from alignkd.teacher_cache.folder import CachePaths, read_manifest
from tests import cached, tiny
from tests.ranks import RankPool

KILLS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_run(tmp_path_factory.mktemp("cache") / "run", 1)


@pytest.fixture(scope="module")
def cache(run: Path, one_rank: RankPool) -> Path:
    folder = cached.begin(run, run.parent / "one")
    one_rank.run(cached.write_on, str(folder))
    return folder


def test_two_ranks_write_the_same_bytes_as_one(run: Path, cache: Path, two_ranks: RankPool) -> None:
    folder = cached.begin(run, run.parent / "two")
    two_ranks.run(cached.write_on, str(folder))
    assert cached.contents(folder) == cached.contents(cache)
    assert len(cached.contents(cache)) == 2 * 16 + 1  # 32 samples, two to a shard


@pytest.fixture(scope="module")
def killed(run: Path) -> dict[str, tuple[Path, int]]:
    """Caches whose writing was killed again and again and then not, and the shards that there were before the
    last start. One program writes them, since its imports take most of the time."""
    draw = random.Random(3)
    kills = {"exact": [draw.randint(1, 11) for _ in range(KILLS)], "fp8": [17, 6, 10], "tokens": [9, 11]}
    folders = {
        "exact": cached.begin(run, run.parent / "killed"),
        "fp8": begin_fp8(run, "fp8-killed"),
        "tokens": begin_tokens(run, "tokens-killed"),
    }
    arguments = [text for name in kills for text in (str(folders[name]), ",".join(map(str, kills[name])))]
    done = subprocess.run(
        [sys.executable, "-m", "tests.teacher.killed_cache", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, line in zip(kills, done.stdout.splitlines()[-len(kills) :], strict=True):
        told = json.loads(line)
        assert told["ends"] == [-signal.SIGKILL] * len(kills[name]), done.stderr
        assert not told["finished"]
        assert told["last"] == 0, done.stderr
        found[name] = (folders[name], told["records"])
    return found


def test_a_cache_that_was_killed_ten_times_is_the_one_that_nobody_killed(
    cache: Path, killed: dict[str, tuple[Path, int]]
) -> None:
    """Killed before file operations, some of which come before the first shard, some between a shard and its
    record."""
    folder, records = killed["exact"]
    # At least five shards are written before the last start. How many more depends on how far rank 1
    # gets before it is killed because rank 0 is dead.
    assert 5 <= records < 16
    assert cached.contents(folder) == cached.contents(cache)


def begin_fp8(run: Path, name: str) -> Path:
    folder = cached.begin(run, run.parent / name)
    cached.change_config(folder, teacher={"cache_form": "fp8"})
    return folder


def test_a_cache_in_fp8_has_the_rounded_states_of_the_exact_one_whether_it_was_killed_or_not(
    run: Path, cache: Path, killed: dict[str, tuple[Path, int]], one_rank: RankPool
) -> None:
    whole = begin_fp8(run, "fp8-whole")
    one_rank.run(cached.write_on, str(whole))
    for shard in range(16):
        exact, found = (load_file(CachePaths(folder).shard(shard)) for folder in (cache, whole))
        stored = to_fp8(exact["hidden"])
        assert found.keys() == {*stored, "offsets", "crc32"}
        assert found["offsets"].equal(exact["offsets"])
        for name, tensor in stored.items():
            assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    assert read_manifest(whole).positions == read_manifest(cache).positions
    folder, records = killed["fp8"]
    assert 2 <= records < 16
    assert cached.contents(folder) == cached.contents(whole)


@pytest.fixture(scope="module")
def tokens(run: Path, one_rank: RankPool) -> Path:
    """A cache of the 16 most likely tokens at temperature 2."""
    folder = begin_tokens(run, "tokens")
    one_rank.run(cached.write_on, str(folder))
    return folder


def begin_tokens(run: Path, name: str) -> Path:
    folder = cached.begin(run, run.parent / name)
    distillation = {"divergence": "forward_kl", "temperature": 2.0}
    cached.change_config(
        folder, teacher={"cache_form": "top_k", "cache_top_k": 16}, distillation=distillation
    )
    return folder


def test_a_cache_of_tokens_that_was_killed_is_the_one_that_nobody_killed(
    tokens: Path, killed: dict[str, tuple[Path, int]]
) -> None:
    folder, records = killed["tokens"]
    assert 0 < records < 16
    assert cached.contents(folder) == cached.contents(tokens)


def test_a_cache_of_tokens_holds_those_of_the_hidden_states(cache: Path, tokens: Path) -> None:
    head = load_model(tiny.TEACHER, BuildOptions(torch.float32)).head.weight.detach()
    for number in range(16):
        of_hidden, of_tokens = (load_file(CachePaths(folder).shard(number)) for folder in (cache, tokens))
        assert of_tokens["offsets"].equal(of_hidden["offsets"])
        p = (of_hidden["hidden"] @ head.T / 2.0).softmax(-1)
        most_likely = p.sort(dim=-1, descending=True).values[:, :16]
        torch.testing.assert_close(p.gather(1, of_tokens["tokens"].long()), most_likely)
        rest = 1 - most_likely.sum(dim=-1, keepdim=True)
        expected = torch.cat([most_likely, rest], dim=-1).log()
        torch.testing.assert_close(of_tokens["log_probs"].float(), expected, rtol=2**-11, atol=1e-4)
    identity = read_manifest(tokens).identity
    assert (identity.form, identity.width) == ("top_k", 16)
    assert of_tokens["tokens"].shape == (read_manifest(tokens).shards[15].positions, 16)


def test_shards_hold_the_normed_hidden_states_in_the_order_of_the_samples(run: Path, cache: Path) -> None:
    stored = read_index(CachePaths(cache).index)
    assert stored is not None
    files = [JsonListFile(source.file) for source in cached.config_of(cache).data.sources]
    cases = {tiny.CASES[name]["record"]["id"]: name for name in ("v1", "rounds", "text", "plain")}
    model = load_model(tiny.TEACHER, BuildOptions(torch.float32))
    expected = {}
    with torch.no_grad():
        for name in cases.values():
            batch = tiny.batch_of(name)
            hidden_ND = model(batch).hidden_BLD.flatten(0, 1)[batch.logit_positions_N]
            expected[name] = hidden_ND
    seen = set()
    index = stored.index
    for shard in range(16):
        tensors = load_file(CachePaths(cache).shard(shard))
        bounds = tensors["offsets"].tolist()
        for place, sample in enumerate((2 * shard, 2 * shard + 1)):
            entry = files[int(index.source[sample])].entry(int(index.start[sample]), int(index.stop[sample]))
            name = cases[entry["id"].rpartition("-")[0]]
            assert tensors["hidden"][bounds[place] : bounds[place + 1]].equal(expected[name])
            seen.add(name)
    assert seen == set(cases.values())
    manifest = read_manifest(cache)
    assert manifest.identity.weights == fingerprint(model)
    assert manifest.positions == sum(len(expected[name]) for name in cases.values()) * 8


def write_or_refuse(ranks: Ranks, folder: str) -> str:
    try:
        cached.write_on(ranks, folder)
    except UserError as error:
        return str(error)
    return "written"


def test_the_cache_of_something_else_is_not_continued(
    run: Path, cache: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    folder = cached.begin(run, tmp_path / "cache")
    CachePaths(folder).identity.write_bytes(CachePaths(cache).identity.read_bytes())
    cached.change_config(folder, distillation={"logit_positions": "all_text"})
    (message,) = one_rank.run(write_or_refuse, str(folder))
    assert "holds the cache of something else" in message
    assert "positions (distillation.logit_positions): supervised in the cache, all_text in the run" in message
    assert not CachePaths(folder).shards.exists()


def test_a_shard_that_is_lost_or_cut_is_written_again(run: Path, cache: Path, one_rank: RankPool) -> None:
    before = cached.contents(cache)
    CachePaths(cache).shard(1).unlink()
    CachePaths(cache).record(4).unlink()
    os.truncate(CachePaths(cache).shard(6), 100)
    assert one_rank.run(write_or_refuse, str(cache)) == ["written"]
    assert cached.contents(cache) == before


def refusals(ranks: Ranks, folder: str, run: str) -> list[str | None]:
    """Of a run whose index is that of the cache, has lost the last sample, and has two in another order."""
    config = load_config(RunPaths(Path(run)).config)
    stored = read_index(CachePaths(Path(folder)).index)
    assert stored is not None
    index, swapped = stored.index, [1, 0, *range(2, len(stored.index))]
    others = [dataclasses.replace(index, **rows(index, keep)) for keep in (range(len(index) - 1), swapped)]
    found: list[str | None] = []
    for of in (index, *others):
        try:
            identity = _cache_identity(config, of, ranks)
            assert identity is not None
            found.append(None)
        except UserError as error:
            found.append(str(error))
    return found


def rows(index: Index, keep: Sequence[int]) -> dict[str, Any]:
    return {name: getattr(index, name)[list(keep)] for name in ARRAYS}


def test_a_run_whose_index_has_other_entries_is_refused(cache: Path, one_rank: RankPool) -> None:
    """Records and settings are the same: another version may keep other entries."""
    run = cached.cached_run(cache.parent / "reads", cache, 1)
    ((same, fewer, swapped),) = one_rank.run(refusals, str(cache), str(run))
    assert same is None
    assert f"teacher.cache = {cache}: the cache is stale: 32 samples in it and 31 in the run" in str(fewer)
    assert "32 in the run, which are not the same entries of the records; write it anew" in str(swapped)


def test_rank_0_waits_for_shards_that_it_sees_late(cache: Path, tmp_path: Path) -> None:
    late = Path(shutil.copytree(cache, tmp_path / "late"))
    whole = read_manifest(late)
    CachePaths(late).manifest.unlink()
    path, seconds = CachePaths(late).record(3), [0.0]
    content = path.read_bytes()
    path.unlink()

    def sleep(pause: float) -> None:
        seconds[0] += pause
        if seconds[0] > 3:
            path.write_bytes(content)

    patience = Patience(30.0, lambda: seconds[0], sleep)
    assert _finish(late, whole.identity, patience) == whole == read_manifest(late)
    assert seconds == [4.0]
    CachePaths(late).shard(2).unlink()
    CachePaths(late).manifest.unlink()
    with pytest.raises(FileSystemError, match=r"00002.safetensors: missing after it was written"):
        _finish(late, whole.identity, patience)
    assert seconds == [30.0]  # for all shards together
    assert not CachePaths(late).manifest.exists()


def told_before_others_are_asked(ranks: Ranks, folder: str) -> list[str]:
    """What a rank has logged of its failure when it waits for the others."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    asked: list[list[str]] = []

    class Asking(Ranks):
        def sum_on_host(self, values: list[int]) -> list[int]:
            asked.append(list(logged))
            return super().sum_on_host(values)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache_writer.log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_writer, "write_shard", fail)
        with pytest.raises(FileSystemError):
            cached.write_on(Asking(**vars(ranks)), folder)
    cache_writer.log.removeHandler(handler)
    return asked[-1]


def test_a_rank_that_fails_says_so_before_it_waits_for_the_others(
    run: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    folder = cached.begin(run, tmp_path / "full")
    (told,) = one_rank.run(told_before_others_are_asked, str(folder))
    assert told == [f"{folder}: cannot be written ([Errno 28] No space left on device)"]
