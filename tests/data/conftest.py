"""What the data tests share: the fixture's files, its tokenizer, and files in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignkd.data.images import ImageProcessor
from alignkd.data.tokenizer import SentencePieceTokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mobilevlm_v2_tiny"


@pytest.fixture(scope="session")
def fixture_folder() -> Path:
    return FIXTURE


@pytest.fixture(scope="session")
def cases() -> dict[str, Any]:
    return json.loads((FIXTURE / "cases.json").read_text())


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.from_folder(FIXTURE / "teacher")


@pytest.fixture(scope="session")
def preprocessor_config() -> dict[str, Any]:
    path = FIXTURE / "openai" / "clip-tiny-patch14-336" / "preprocessor_config.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def processor(preprocessor_config: dict[str, Any]) -> ImageProcessor:
    return ImageProcessor(preprocessor_config, max_image_pixels=1_000_000)


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., str]:
    def write(entries: Any, name: str = "data.json") -> str:
        (tmp_path / name).write_text(json.dumps(entries))
        return str(tmp_path / name)

    return write
