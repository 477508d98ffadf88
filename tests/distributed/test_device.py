"""Which GPU a rank takes, and what it says when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignkd.distributed.device import take_device
from alignkd.errors import EXIT_BAD_NODE, NodeError
from tests import tiny

ROOT = Path(__file__).parents[2]


class Gpus:
    """As DeepSpeed's accelerator sees them; ``broken`` raises when it is taken."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        self.count, self.broken = count, broken
        self.taken: int | None = None

    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        if index == self.broken:
            raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")
        self.taken = index


@pytest.fixture(autouse=True)
def rank_3(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "7", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "SLURMD_NODENAME": "n2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("count", "index"), [(4, 3), (8, 3), (1, 0)])
def test_a_rank_takes_its_gpu_or_the_only_one_that_it_sees(count: int, index: int) -> None:
    gpus = Gpus(count)
    take_device(gpus)
    assert gpus.taken == index
    assert os.environ["LOCAL_RANK"] == str(index)


def test_too_few_gpus_are_not_shared() -> None:
    with pytest.raises(NodeError, match="rank 7 on n2 sees 3 GPUs, and its node has 4 ranks"):
        take_device(Gpus(3))


def test_a_rank_without_a_gpu_names_node_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.init", lambda: (_ for _ in ()).throw(RuntimeError("no driver\nsee X")))
    with pytest.raises(NodeError, match=r"^rank 7 on n2 sees no GPU: no driver$"):
        take_device(Gpus(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NodeError, match="sees no GPU: CUDA_VISIBLE_DEVICES is ''; did the job request GPUs"):
        take_device(Gpus(0))


def test_a_broken_gpu_is_named() -> None:
    with pytest.raises(NodeError, match=r"on n2 cannot use GPU 3: CUDA error: uncorrectable ECC error$"):
        take_device(Gpus(4, broken=3))


def test_a_rank_that_was_promised_a_gpu_does_not_train_without(tmp_path: Path) -> None:
    """It ends before the rendezvous, with a code that is retried."""
    variables = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "8"}
    run = tiny.write_run(tmp_path / "run", 1)
    done = subprocess.run(
        [sys.executable, "-m", "alignkd.train", str(run)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}, timeout=120,
    )  # fmt: skip
    assert done.returncode == EXIT_BAD_NODE
    assert "alignkd: error: rank 7 on n2 sees no GPU: CUDA_VISIBLE_DEVICES is ''" in done.stderr
