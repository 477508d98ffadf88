"""An engine that shows its gradients, and the first optimizer step of a run folder with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from alignkd.config.schema import DistillationSection
from alignkd.distributed.ranks import Ranks
from alignkd.engine import student_step
from alignkd.engine.gathered_bytes import count_gathered_bytes
from alignkd.engine.optimizer_step import (
    StepInfo,
    StepSums,
    all_reduce_step_info,
    run_optimizer_step,
    term_weights,
)
from alignkd.engine.setup import prepare
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.losses import fused_logits, logits
from alignkd.losses.attention import plain_attention_loss
from alignkd.losses.logits import plain_logit_losses
from alignkd.losses.total import TERMS, means, total
from alignkd.run_folder.progress import Progress

# The product's losses, and the plain forms that they must equal.
PLAIN = {"fused_logit_losses": plain_logit_losses, "fused_attention_loss": plain_attention_loss}
POSITIONS_PER_CHUNK = 8  # far below the supervised positions of the tiny batches: several chunks


class EngineSpy:
    """An engine that shows what it minimises, and the averaged gradients before the optimizer step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def backward(self, loss: torch.Tensor) -> None:
        self._losses.append(loss.detach())
        self._engine.backward(loss)

    def minimised(self, ranks: Ranks) -> float:
        """The loss of the optimizer step, over all ranks: DeepSpeed averages over them, and divides by the
        accumulation in backward. Collective."""
        loss = torch.stack(self._losses).sum()
        torch.distributed.all_reduce(loss)
        return loss.item() / (ranks.world_size * self._engine.gradient_accumulation_steps())

    def step(self) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            for name, parameter in self._engine.module.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name] = safe_get_full_grad(parameter).clone()
        self._engine.step()


@contextmanager
def plain_losses(names: Sequence[str]) -> Iterator[None]:
    """Inside, the student's step computes these losses by autograd."""
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(patch.object(student_step, name, PLAIN[name]))
        yield


def reported_loss(sums: StepSums, info: StepInfo, distillation: DistillationSection) -> float:
    """The loss of the metrics row. ``sums``: over all ranks."""
    of_terms = means(dict(zip(TERMS, sums.terms.tolist(), strict=True)), info.elements)
    return total(of_terms, term_weights(distillation))


def first_step(ranks: Ranks, run: str, plain: tuple[str, ...] = ()) -> dict[str, Any]:
    """Sums, gradients, and what was gathered during the first step, on data of the run's own loader.
    ``plain``: losses left to autograd."""
    job = prepare(Path(run), ranks, Progress(Path(run), writes=ranks.is_first))
    engine = EngineSpy(job.engine)
    with job.loader:
        window = next(iter(job.loader))
    info = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    head_rows: list[int] = []
    cross_entropy_sum = logits.cross_entropy_sum

    def seen(log_student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head_rows.append(log_student.shape[0])
        return cross_entropy_sum(log_student, labels)

    tower_runs: list[int] = []
    job.engine.module.student.vision_tower.embeddings.register_forward_hook(lambda *_: tower_runs.append(1))
    with (
        count_gathered_bytes() as gathered,
        plain_losses(plain),
        patch.object(fused_logits, "POSITIONS_PER_CHUNK", POSITIONS_PER_CHUNK),
        patch.object(fused_logits, "cross_entropy_sum", seen),
        patch.object(logits, "cross_entropy_sum", seen),
    ):
        sums = run_optimizer_step(
            engine,
            job.teacher,
            window,
            info,
            job.config.distillation,
            ranks,
            Stopwatch(),
            job.config.teacher.lookahead,
        )
    torch.distributed.all_reduce(sums.terms)
    assert engine.minimised(ranks) == pytest.approx(
        reported_loss(sums, info, job.config.distillation), rel=1e-5
    )
    return {
        "sums": sums.terms,
        "norm": float(sums.gradient_norm),
        "gradients": engine.gradients,
        "micro_batches": len(window),
        "packed": all(batch.segments for batch in window),
        "tower_runs": len(tower_runs),
        "head_rows": head_rows,
        "gathered": gathered.total,
        "read_outside_their_module": _externally_read(job.engine.module),
        "counts": info.counts,
    }


def _externally_read(module: torch.nn.Module) -> list[str]:
    """Modules in whose forward ZeRO-3 had to gather a parameter of another module."""
    return [
        name
        for name, part in module.named_modules()
        if hasattr(part, "ds_external_parameters") and list(part.ds_external_parameters())
    ]


def keep_nothing_gathered(run: Path) -> None:
    """ZeRO-3 that releases every parameter after use: with the defaults, tiny models stay gathered."""
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
