from __future__ import annotations

import pytest
import torch

import alignkd
from alignkd.evaluate.answering_model import AnsweringModel
from tests import tiny


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> None:
    """Models here are tiny: threads that wait for one another cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> AnsweringModel:
    return alignkd.load(tiny.STUDENT)
