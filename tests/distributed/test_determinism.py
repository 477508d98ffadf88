"""``training.deterministic`` reaches torch and cuBLAS before a rank joins the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignkd import train
from alignkd.distributed import determinism, ranks
from alignkd.engine.signals import StopRequest
from alignkd.errors import UserError
from alignkd.models.projector import LDPv2Projector
from tests import tiny


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What holds in a rank when it joins the process group, where it ends here."""
    seen: list[dict[str, Any]] = []

    def start_ranks(_: float) -> None:
        seen.append(
            {
                "workspace": os.environ.get(determinism.WORKSPACE),
                "algorithms": torch.are_deterministic_algorithms_enabled(),
                "memory-efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
                "flash attention": torch.backends.cuda.flash_sdp_enabled(),
                "fills": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            }
        )
        raise UserError("far enough")

    monkeypatch.setattr(ranks, "start_ranks", start_ranks)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(determinism.WORKSPACE, "set first, so that it is restored")
    monkeypatch.delenv(determinism.WORKSPACE)
    return seen


def join(run: Path) -> None:
    with pytest.raises(UserError, match="far enough"):
        train._run(run, StopRequest())


def test_the_key_reaches_the_rank_before_it_joins_the_others(
    tmp_path: Path, joining: list[dict[str, Any]]
) -> None:
    join(tiny.write_run(tmp_path / "usual", 1))
    join(tiny.write_run(tmp_path / "run", 1, training__deterministic=True))
    usual, deterministic = joining
    assert usual["workspace"] is None
    assert usual["algorithms"] is False
    assert usual["memory-efficient attention"] is True
    assert deterministic == {
        "workspace": ":4096:8",
        "algorithms": True,
        "memory-efficient attention": False,  # its backward adds up in any order
        "flash attention": True,
        "fills": False,
    }


def test_a_workspace_from_outside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(determinism.WORKSPACE, ":16:8")
    determinism.fix_workspace()
    assert os.environ[determinism.WORKSPACE] == ":16:8"


def refused(*_: Any) -> torch.Tensor:
    raise RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation")


def test_the_projector_pools_without_the_operation_that_a_gpu_would_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch refuses the backward of adaptive pooling on CUDA; here only its name can be refused."""
    torch.manual_seed(0)
    projector = LDPv2Projector(8, 16, tokens_per_side=4)
    features = torch.randn(2, 64, 8)
    usual = projector(features)
    usual.sum().backward()
    gradient = projector.mlp.mlp[0].weight.grad.clone()
    projector.zero_grad()
    determinism.use_deterministic_kernels()
    monkeypatch.setattr(F, "adaptive_avg_pool2d", refused)
    tokens = projector(features)
    tokens.sum().backward()
    torch.testing.assert_close(tokens, usual)
    torch.testing.assert_close(projector.mlp.mlp[0].weight.grad, gradient)
    # A grid that is not a multiple of the other has no other form: the error names the operation.
    with pytest.raises(RuntimeError, match="adaptive_avg_pool2d"):
        projector(torch.randn(1, 36, 8))
