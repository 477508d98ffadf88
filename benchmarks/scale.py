"""What ranks gather: ``python -m benchmarks.scale``. Bytes and seconds of an optimizer step on 1, 2 and 4
processes, by the teacher's placement, its look-ahead, and the length of the accumulation window.

Real DeepSpeed engines over gloo on one machine, on the tests' tiny models with their ZeRO-3 settings set so
that nothing stays gathered: bytes are exact and count in multiples of the teacher, seconds are those of many
processes on few cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alignkd.run_folder.paths import RunPaths
from benchmarks import report
from tests import tiny
from tests.ranks import RankPool

PLACEMENTS = ("zero3", "zero3_node", "zero3_offload", "replicated")
STEPS = 5
LEAN = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


def measure(ranks: Any, folder: str, accumulation: int) -> dict[str, Any]:
    """On every rank: bytes of the last of :data:`STEPS` optimizer steps and seconds of all but the first two
    (what ZeRO-3 keeps is decided there)."""
    from alignkd.config import load_run_config
    from alignkd.engine.build import build_student_engine, build_teacher
    from alignkd.engine.gathered_bytes import count_gathered_bytes
    from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
    from alignkd.engine.signals import StopRequest
    from alignkd.engine.stopwatch import Stopwatch

    run = Path(folder)
    config = load_run_config(RunPaths(run).config)
    engine, _ = build_student_engine(config, json.loads(RunPaths(run).student_deepspeed.read_text()), ranks)
    file = RunPaths(run).teacher_deepspeed
    ds_teacher = json.loads(file.read_text()) if file.exists() else None
    if ds_teacher is not None:
        ds_teacher["zero_optimization"] |= LEAN
    per_node = max(ranks.world_size // 2, 1)
    on_nodes = {
        "NODE_RANK": str(ranks.rank // per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "LOCAL_RANK": str(ranks.rank % per_node),
    }
    with patch.dict(os.environ, on_nodes):
        teacher = build_teacher(config, ds_teacher, ranks)
    assert teacher is not None
    window = [tiny.batch_of("v1", "text", packing=True) for _ in range(accumulation)]
    info = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    seconds, gathered = [], 0
    for number in range(STEPS):
        ranks.barrier()
        start = time.perf_counter()
        with count_gathered_bytes() as counter:
            run_optimizer_step(
                engine,
                teacher,
                window,
                info,
                config.distillation,
                ranks,
                Stopwatch(),
                config.teacher.lookahead,
            )
        ranks.barrier()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
        gathered = counter.total
    whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in teacher.model.parameters())
    return {"gathered": gathered, "seconds": seconds, "teacher": whole}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = report.facts(arguments)
    results = []
    for world_size in options.ranks:
        pool = RankPool(world_size)
        try:
            for placement in PLACEMENTS:
                for lookahead, accumulation in ((None, 1), (None, 4), (1, 4)):
                    results.append(_measured(pool, placement, lookahead, accumulation))
                    print(results[-1], flush=True)
        finally:
            pool.stop()
    head = ["placement", "ranks", "micro-batches", "look-ahead", "gathered MB", "x teacher", "seconds a step"]
    body = report.table(head, [_row(result) for result in results])
    print(report.section("scale", measured, body))
    if options.publish:
        report.publish("scale", measured, body, results)


def _measured(pool: RankPool, placement: str, lookahead: int | None, accumulation: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="alignkd-benchmark-") as name:
        run = tiny.write_run(
            Path(name) / "run",
            pool.world_size,
            teacher__placement=placement,
            teacher__lookahead=lookahead,
            # Stage 0: the student gathers nothing, so all that is counted is the teacher's.
            student__zero_stage=0,
            training__global_batch_size=2 * accumulation * pool.world_size,
        )
        found = pool.run(measure, str(run), accumulation, timeout=400)[0]
    return {
        "placement": placement,
        "ranks": pool.world_size,
        "accumulation": accumulation,
        "lookahead": lookahead,
        **found,
    }


def _row(result: dict[str, Any]) -> list[str]:
    return [
        result["placement"],
        str(result["ranks"]),
        str(result["accumulation"]),
        "all" if result["lookahead"] is None else str(result["lookahead"]),
        f"{result['gathered'] / 1e6:.2f}",
        f"{result['gathered'] / result['teacher']:.2f}",
        f"{statistics.median(result['seconds']):.3f}",
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
