"""An engine that shows its gradients, and the first optimizer step of a run folder under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_full_grad

from alignkd.engine.gathered_bytes import count_gathered_bytes
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.progress import Progress
from alignkd.engine.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.losses import fused_head, logits

POSITIONS_PER_CHUNK = 8  # far below the supervised positions of the tiny batches: several chunks


class EngineSpy:
    """An engine that shows the averaged gradients as they are before the optimizer step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, torch.Tensor] = {}

    def __call__(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            for name, parameter in self._engine.module.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name] = safe_get_full_grad(parameter).clone()
        self._engine.step()


def first_step(ranks: Ranks, run: str) -> dict[str, Any]:
    """Sums, gradients, and what was gathered during the first step, on data of the run's own loader."""
    job = prepare(Path(run), ranks, Progress(Path(run), writes=ranks.is_first))
    engine = EngineSpy(job.engine)
    with job.loader:
        window = next(iter(job.loader))
    facts = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    head_rows: list[int] = []
    cross_entropy_sum = logits.cross_entropy_sum

    def seen(log_student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head_rows.append(log_student.shape[0])
        return cross_entropy_sum(log_student, labels)

    tower_runs: list[int] = []
    job.engine.module.student.vision_tower.embeddings.register_forward_hook(lambda *_: tower_runs.append(1))
    with (
        count_gathered_bytes() as gathered,
        patch.object(fused_head, "POSITIONS_PER_CHUNK", POSITIONS_PER_CHUNK),
        patch.object(fused_head, "cross_entropy_sum", seen),
        patch.object(logits, "cross_entropy_sum", seen),
    ):
        sums = run_optimizer_step(
            engine,
            job.teacher,
            window,
            facts,
            job.config.distillation,
            ranks,
            Stopwatch(),
            job.config.teacher.lookahead,
        )
    torch.distributed.all_reduce(sums.terms)
    return {
        "sums": sums.terms,
        "norm": float(sums.gradient_norm),
        "gradients": engine.gradients,
        "micro_batches": len(window),
        "packed": all(batch.segments for batch in window),
        "tower_runs": len(tower_runs),
        "head_rows": head_rows,
        "gathered": gathered.total,
        "counts": facts.counts,
    }


def keep_nothing_gathered(run: Path) -> None:
    """ZeRO-3 that lets go of every parameter after its use: on tiny models the defaults gather everything."""
    for path in (run / "ds").glob("*.json"):
        config = json.loads(path.read_text())
        if config["zero_optimization"]["stage"] == 3:
            config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
            path.write_text(json.dumps(config))
