"""Every placement of the teacher on four real ranks (two nodes of two): targets, shards, process groups."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from deepspeed.comm import comm

from alignkd.config import load_config
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_teacher
from alignkd.teacher.provider import held_bytes
from launcher.plan.memory import teacher_weights
from launcher.plan.sharding import Rendered
from launcher.plan.sizes import run_sizes
from launcher.plan.workload import Cluster
from tests import tiny
from tests.ranks import RankPool

# Release every parameter after use: with the defaults, tiny models stay gathered.
LEAN = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
SHARDED = ("zero3", "zero3_node", "zero3_offload")


def compare(ranks: Ranks, folder: str) -> dict[str, Any]:
    on_nodes = {"NODE_RANK": str(ranks.rank // 2), "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(ranks.rank % 2)}
    # Every rank has its own batch, one of them without an image, and none may deadlock.
    batch = tiny.batch_of(*[("v1", "rounds"), ("text",), ("plain",), ()][ranks.rank])
    found: dict[str, Any] = {}
    expected: Any = None
    with patch.dict(os.environ, on_nodes):
        for placement in ("replicated", *SHARDED):
            run = Path(folder) / placement
            config = load_config(run / "config.yaml")
            file = run / "ds" / "teacher.json"
            ds_teacher = json.loads(file.read_text()) if file.exists() else None
            if ds_teacher is not None:
                ds_teacher["zero_optimization"] |= LEAN
            teacher = build_teacher(config, ds_teacher, ranks)
            assert teacher is not None
            gathers: Counter[tuple[int, ...]] = Counter()
            with patch.object(comm.cdb, "all_gather_into_tensor", _recording(gathers)):
                for _ in range(2):  # some parameters become resident after the second forward only
                    targets = teacher.targets(batch)
                head = teacher.head_weight()
            expected = expected or (targets, head)
            pairs = list(zip((*targets[:4], head), (*expected[0][:4], expected[1]), strict=True))
            found[placement] = {
                "equal": all(ours.equal(theirs) for ours, theirs in pairs),
                "held": held_bytes(teacher),
                "gathers": dict(gathers),
            }
    return found


def _recording(gathers: Counter[tuple[int, ...]]) -> Any:
    original = comm.cdb.all_gather_into_tensor

    def all_gather_into_tensor(*tensors: Any, group: Any = None, **options: Any) -> Any:
        gathers[tuple(dist.get_process_group_ranks(group or dist.group.WORLD))] += 1
        return original(*tensors, group=group, **options)

    return all_gather_into_tensor


def test_every_placement_gives_equal_targets_with_the_planned_shards_and_groups(
    four_ranks: RankPool, tmp_path: Path
) -> None:
    for placement in ("replicated", *SHARDED):
        tiny.write_run(tmp_path / placement, 4, teacher__placement=placement)
    config = load_config(tmp_path / "zero3" / "config.yaml")
    sizes = run_sizes(config)
    for rank, found in enumerate(four_ranks.run(compare, str(tmp_path))):
        assert all(values["equal"] for values in found.values())
        whole = found["replicated"]["held"]["shard"]
        node = (0, 1) if rank < 2 else (2, 3)
        for placement, on_device, in_host, group in (
            ("replicated", 1, 0, None),
            ("zero3", 1 / 4, 0, (0, 1, 2, 3)),
            ("zero3_node", 1 / 2, 0, node),
            ("zero3_offload", 0, 1 / 4, (0, 1, 2, 3)),
        ):
            held = found[placement]["held"]
            # Shards are filled up to a multiple of the ranks, hence not exact.
            assert held["shard"] == pytest.approx(whole * on_device, rel=0.005), placement
            assert held["host"] == pytest.approx(whole * in_host, rel=0.005), placement
            groups = set(found[placement]["gathers"])
            assert groups == ({group} if group else set()), placement
            # What `alignkd plan` says beforehand is exact.
            teacher = config.teacher.model_copy(update={"placement": placement})
            planned = config.model_copy(update={"teacher": teacher})
            zero = None if group is None else LEAN | ({"offload_param": {}} if in_host else {})
            parts = teacher_weights(planned, sizes, Cluster(2, 2), Rendered({}, zero))
            shard = parts[0]
            assert shard.bytes == held["host" if shard.in_host_memory else "shard"]
            assert sum(part.bytes for part in parts[1:]) == held["head"]
