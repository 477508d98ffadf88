"""Predicted gathers of an optimizer step against those of real engines on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkd.config import load_config
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_student_engine, build_teacher
from alignkd.engine.gathered_bytes import count_gathered_bytes
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from launcher.plan.sharding import Rendered
from launcher.plan.sizes import run_sizes
from launcher.plan.traffic import Transfer, run_traffic
from launcher.plan.workload import Cluster, workload
from tests import tiny
from tests.ranks import RankPool

# Only the smallest tensors stay gathered: the defaults would keep all of a tiny model.
LEAN = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def gathered_in_a_step(ranks: Ranks, run: str) -> int:
    """Bytes of the second step: small tensors become resident in the first one."""
    config = load_config(Path(run) / "config.yaml")
    student, teacher = (_lean(Path(run) / "ds" / f"{name}.json") for name in ("student", "teacher"))
    assert student is not None
    engine, _ = build_student_engine(config, student, ranks)
    provider = build_teacher(config, teacher, ranks)
    assert provider is not None
    provider.model.shares_tower = config.distillation.share_vision_tower
    window = [tiny.batch_of("v1", packing=True), tiny.batch_of("text", packing=True)]
    facts = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    counted = 0
    for _ in range(2):
        with count_gathered_bytes() as counter:
            run_optimizer_step(
                engine,
                provider,
                window,
                facts,
                config.distillation,
                ranks,
                Stopwatch(),
                lookahead=config.teacher.lookahead,
            )
        counted = counter.total
    return counted


def _lean(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"] |= LEAN
    return values


@pytest.mark.parametrize(
    ("stage", "placement", "lookahead", "share", "tolerance"),
    [
        (2, "zero3", None, True, 0.02),
        (2, "zero3", 1, True, 0.02),
        (1, "replicated", None, True, 0.02),
        (3, "replicated", None, True, 0.02),
        # CLIP's code accesses its patch embedding from outside the module, so ZeRO-3 gathers it once more:
        # a large part of this tiny tower.
        (3, "replicated", None, False, 0.1),
    ],
)
def test_gathers_agree_with_real_engines(
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    placement: str,
    lookahead: int | None,
    share: bool,
    tolerance: float,
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        teacher__placement=placement,
        teacher__lookahead=lookahead,
        distillation__share_vision_tower=share,
    )
    config, cluster = load_config(run / "config.yaml"), Cluster(1, 2)
    sizes = run_sizes(config)
    work = workload(config, cluster, sizes.student.config.vision_tokens)
    assert work.accumulation == 2
    files = [_lean(run / "ds" / f"{name}.json") for name in ("student", "teacher")]
    rendered = Rendered(*(None if file is None else file["zero_optimization"] for file in files))
    transfers = run_traffic(config, sizes, work, cluster, rendered)
    predicted = sum(transfer.bytes for transfer in transfers if transfer.name != "gradients")
    for measured in two_ranks.run(gathered_in_a_step, str(run)):
        assert measured == pytest.approx(predicted, rel=tolerance), transfers


def test_rings_send_a_share_of_the_bytes_to_each_rank_and_node() -> None:
    everywhere = Transfer("x", 800, ranks=8, nodes=2)
    assert (everywhere.received_by_rank, everywhere.entering_node) == (700, 400)
    inside = Transfer("x", 800, ranks=4, nodes=1)
    assert (inside.received_by_rank, inside.entering_node) == (600, 0)
    reduced = Transfer("x", 800, ranks=8, nodes=2, passes=2)
    assert (reduced.received_by_rank, reduced.entering_node) == (1400, 800)
