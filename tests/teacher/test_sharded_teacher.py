"""The ZeRO-3 teacher on real ranks: equal to a whole copy, and really sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkd.distributed.ranks import Ranks
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.loading import fingerprint
from alignkd.teacher.provider import ReplicatedTeacher, ShardedTeacher, held_bytes
from tests import tiny
from tests.ranks import RankPool


def ds_config(precision: str) -> dict[str, Any]:
    """Releases every parameter after use: with the defaults, tiny models stay gathered."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    half = {precision: {"enabled": True}} if precision != "fp32" else {}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **half}


def compare(ranks: Ranks, precision: str) -> dict[str, Any]:
    dtype = DTYPES[precision]
    whole = ReplicatedTeacher(str(tiny.TEACHER), 16, BuildOptions(dtype))
    sharded = ShardedTeacher(str(tiny.TEACHER), 16, BuildOptions(dtype, zero3=ds_config(precision)))
    # Every rank has its own batch, one of them without an image, and none may deadlock.
    cases = [("v1", "rounds"), ("text",), ("plain",), ()][ranks.rank]
    batch = tiny.batch_of(*cases)
    expected = whole.targets(batch)
    differences = []
    for _ in range(2):  # some parameters become resident after the second forward only
        for ours, theirs in zip(sharded.targets(batch)[:4], expected[:4], strict=True):
            differences.append((ours.float() - theirs.float()).abs().max().item() if ours.numel() else 0.0)
    modules = sharded.model.named_modules()
    outside = [name for name, module in modules if list(module.ds_external_parameters())]
    total = held_bytes(whole)["shard"]
    held = held_bytes(sharded)
    head = sharded.head_weight()
    sharded.keep_head = True
    kept = sharded.head_weight()
    return {
        "difference": max(differences),
        "held_share": held["shard"] / total,
        "head_bytes": (held["head"], head.numel() * head.element_size()),
        "head_equal": torch.equal(head, whole.head_weight()) and torch.equal(head, kept),
        "head_kept": (kept is head, sharded.head_weight() is kept),
        "fingerprints": (fingerprint(sharded.model.model), fingerprint(whole.model.model)),
        "dtypes": {str(parameter.ds_tensor.dtype) for parameter in sharded.model.parameters()},
        "read_outside_their_module": outside,
        "rotary_dtype": str(sharded.model.model.language_model.rotary_emb.inv_freq.dtype),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sharded_teacher_equals_a_whole_one(
    request: pytest.FixtureRequest, world_size: int, precision: str
) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
    for result in pool.run(compare, precision):
        assert result["difference"] == 0.0
        assert result["held_share"] <= 1 / world_size + 0.01
        assert result["head_equal"]
        assert result["head_kept"] == (False, True)  # gathered in each step, or once
        assert result["head_bytes"][0] == result["head_bytes"][1]
        assert result["fingerprints"][0] == result["fingerprints"][1]
        assert result["dtypes"] == {str(DTYPES[precision])}
        assert result["rotary_dtype"] == "torch.float32"
        # ZeRO-3 gathers a weight that is read outside its own module's forward for the whole forward of the
        # reader. transformers' CLIP embeddings read the dtype of their convolution's weight; nothing of ours.
        assert result["read_outside_their_module"] == ["model.vision_tower.embeddings"]
