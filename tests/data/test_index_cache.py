"""The index that a run keeps in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignkd.config.schema import DataSection
from alignkd.data import index_cache
from alignkd.data.index import ARRAYS
from alignkd.data.index_cache import cached_index
from alignkd.data.tokenizer import SentencePieceTokenizer


def entries(answer: str) -> list[dict]:
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": answer}]
    return [{"id": str(number), "conversations": turns} for number in range(5)]


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


def test_the_second_start_reads_what_the_first_has_built(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer, builds: list[None]
) -> None:
    first, second = (cached_index(tmp_path / "index.npz", data, tokenizer, 16) for _ in range(2))
    assert len(builds) == 1
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ARRAYS)
    assert (first.fingerprint, first.summary()) == (second.fingerprint, second.summary())


def test_other_data_settings_or_damage_build_anew(
    tmp_path: Path,
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    builds: list[None],
    write_json: Callable[..., str],
) -> None:
    path = tmp_path / "index.npz"
    cached_index(path, data, tokenizer, 16)
    cached_index(path, data, tokenizer, 9)
    cached_index(path, data.model_copy(update={"max_length": 99}), tokenizer, 9)
    write_json(entries("three"))
    assert len(cached_index(path, data, tokenizer, 9)) == 5
    path.write_bytes(path.read_bytes()[:50])
    cached_index(path, data, tokenizer, 9)
    assert len(builds) == 5


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, data: DataSection, tokenizer: SentencePieceTokenizer
) -> None:
    assert len(cached_index(tmp_path / "missing" / "index.npz", data, tokenizer, 16)) == 5
