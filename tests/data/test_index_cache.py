"""The index that a run keeps in its folder, and that its user's other runs find."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignkd import __version__
from alignkd.config.schema import DataSection
from alignkd.data import index_cache
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.index import ARRAYS
from alignkd.data.index_cache import KEPT, cached_index
from alignkd.data.index_file import read_index
from alignkd.data.json_list import JsonListFile
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import FileSystemError


def entries(answer: str) -> list[dict]:
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": answer}]
    return [{"id": str(number), "conversations": turns} for number in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def data(write_json: Callable[..., str]) -> DataSection:
    return DataSection.model_validate({"sources": [{"file": write_json(entries("two"))}]})


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element for every index that is really built."""
    made: list[None] = []
    build = index_cache.build_index
    monkeypatch.setattr(index_cache, "build_index", lambda *a, **k: made.append(None) or build(*a, **k))
    return made


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element for every data file that is really read and hashed."""
    made: list[None] = []
    sha256 = JsonListFile.sha256
    monkeypatch.setattr(JsonListFile, "sha256", lambda file: made.append(None) or sha256(file))
    return made


def name_in_cache(fingerprint: str) -> str:
    return f"{fingerprint}-{__version__}.index"


def same(first, second) -> bool:
    arrays = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ARRAYS)
    return arrays and (first.fingerprint, first.reports) == (second.fingerprint, second.reports)


def test_the_second_start_maps_the_index_of_the_first(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer, builds: list[None]
) -> None:
    encoder = MobileVLMEncoder(tokenizer, 16)
    first, second = (cached_index(tmp_path / "index.bin", data, encoder) for _ in range(2))
    assert len(builds) == 1
    assert same(first, second)
    for index in (first, second):
        assert not index.length.flags.owndata


def test_another_run_on_the_same_data_builds_nothing(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer, builds: list[None], own_cache: Path
) -> None:
    encoder = MobileVLMEncoder(tokenizer, 16)
    first, second = (cached_index(tmp_path / f"{run}.bin", data, encoder) for run in "ab")
    assert len(builds) == 1
    assert same(first, second)
    assert [path.name for path in own_cache.iterdir()] == [name_in_cache(first.fingerprint)]
    for path in (*own_cache.iterdir(), tmp_path / "a.bin"):
        path.unlink()
    assert read_index(tmp_path / "b.bin") is not None  # a run's own does not depend on the cache


def test_another_release_rebuilds_the_index_for_new_runs_only(
    tmp_path: Path,
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    builds: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached_index(tmp_path / "a.bin", data, MobileVLMEncoder(tokenizer, 16))
    monkeypatch.setattr(index_cache, "__version__", "999")
    cached_index(tmp_path / "a.bin", data, MobileVLMEncoder(tokenizer, 16))
    assert len(builds) == 1
    cached_index(tmp_path / "b.bin", data, MobileVLMEncoder(tokenizer, 16))
    assert len(builds) == 2


def test_changed_data_or_settings_and_damage_rebuild_the_index(
    tmp_path: Path,
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    builds: list[None],
    write_json: Callable[..., str],
    own_cache: Path,
) -> None:
    path = tmp_path / "index.bin"
    cached_index(path, data, MobileVLMEncoder(tokenizer, 16))
    cached_index(path, data, MobileVLMEncoder(tokenizer, 9))
    cached_index(path, data.model_copy(update={"max_length": 99}), MobileVLMEncoder(tokenizer, 9))
    write_json(entries("three"))
    assert len(cached_index(path, data, MobileVLMEncoder(tokenizer, 9))) == 5
    assert len(builds) == 4
    good = path.read_bytes()
    for number, damaged in enumerate(
        (good[:50], good[:-1], b"", good[:100] + b"x" + good[101:], good[:-8] + b"\x07" + good[-7:])
    ):
        for file in (path, *own_cache.iterdir()):
            file.write_bytes(damaged)
        assert read_index(path) is None
        assert len(cached_index(path, data, MobileVLMEncoder(tokenizer, 9))) == 5
        assert len(builds) == 5 + number
        assert read_index(path) is not None


def test_a_file_is_hashed_again_only_if_it_has_changed(
    tmp_path: Path,
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    builds: list[None],
    hashed: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, file = tmp_path / "index.bin", Path(data.sources[0].file)
    for _ in range(2):  # too young to be told from a version of the same moment
        first = cached_index(path, data, MobileVLMEncoder(tokenizer, 16))
    assert len(hashed) == 2
    monkeypatch.setattr(index_cache, "_SETTLED_NS", -(10**18))
    for _ in range(3):
        cached_index(path, data, MobileVLMEncoder(tokenizer, 16))
    assert len(hashed) == 3
    # The same size, the old time of modification: the change still shows.
    times = file.stat()
    file.write_text(file.read_text().replace("two", "six"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = cached_index(path, data, MobileVLMEncoder(tokenizer, 16))
    assert len(hashed) == 4
    assert changed.fingerprint != first.fingerprint
    assert len(builds) == 2
    # Touched, not changed: hashed, and the index stays.
    os.utime(file)
    assert cached_index(path, data, MobileVLMEncoder(tokenizer, 16)).fingerprint == changed.fingerprint
    assert (len(hashed), len(builds)) == (5, 2)


def test_the_cache_keeps_the_most_recently_used(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer, own_cache: Path
) -> None:
    kept = []
    for number in range(KEPT + 2):
        other = data.model_copy(update={"max_length": 100 + number})
        index = cached_index(tmp_path / "index.bin", other, MobileVLMEncoder(tokenizer, 16))
        os.utime(own_cache / name_in_cache(index.fingerprint), (number, number))
        kept.append(index.fingerprint)
    assert {path.name for path in own_cache.iterdir()} == {*map(name_in_cache, kept[-KEPT:])}


def test_folders_that_cannot_be_written_are_not_an_error(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNKD_CACHE", str(tmp_path / "file"))
    assert len(cached_index(tmp_path / "missing" / "index.bin", data, MobileVLMEncoder(tokenizer, 16))) == 5


def test_another_process_maps_the_same_file_and_is_sent_no_array(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer
) -> None:
    index = cached_index(tmp_path / "index.bin", data, MobileVLMEncoder(tokenizer, 9))
    sent = pickle.dumps(index)
    assert index.start.tobytes() not in sent
    assert same(pickle.loads(sent), index)
    cached_index(tmp_path / "index.bin", data, MobileVLMEncoder(tokenizer, 16))  # another one in its place
    with pytest.raises(FileSystemError, match=r"index\.bin: the index is not what it was"):
        pickle.loads(sent)
