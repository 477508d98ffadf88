"""Predicted gathers and reductions of an optimizer step against those of real engines on two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from deepspeed.comm import comm

from alignkd.config import load_config
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_student_engine, build_teacher
from alignkd.engine.gathered_bytes import count_gathered_bytes
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from launcher.plan.memory import teacher_weights
from launcher.plan.sharding import Rendered
from launcher.plan.sizes import run_sizes
from launcher.plan.traffic import Transfer, run_traffic
from launcher.plan.workload import Cluster, workload
from tests import tiny, vlm
from tests.ranks import RankPool

# Only the smallest tensors stay gathered: the defaults would keep all of a tiny model.
LEAN = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


@contextmanager
def count_reduced_bytes() -> Iterator[dict[str, int]]:
    """Sizes of what is all-reduced, and of what is reduced and scattered."""
    counted = {"all_reduce": 0, "reduce_scatter_tensor": 0}

    def counting(name: str, argument: str) -> Callable[..., Any]:
        original = getattr(comm.cdb, name)

        def count(*arguments: Any, **keywords: Any) -> Any:
            tensor = keywords.get(argument, arguments[0] if arguments else None)
            if tensor.numel() > 10:  # not norms and flags
                counted[name] += tensor.numel() * tensor.element_size()
            return original(*arguments, **keywords)

        return count

    with (
        patch.object(comm.cdb, "all_reduce", counting("all_reduce", "tensor")),
        patch.object(comm.cdb, "reduce_scatter_tensor", counting("reduce_scatter_tensor", "input_tensor")),
    ):
        yield counted


def sent_in_a_step(ranks: Ranks, run: str) -> dict[str, Any]:
    """Bytes and sums of the second step: the first one leaves small tensors resident, and a head."""
    config = load_config(Path(run) / "config.yaml")
    student, teacher = (_lean(Path(run) / "ds" / f"{name}.json") for name in ("student", "teacher"))
    assert student is not None
    engine, _ = build_student_engine(config, student, ranks)
    provider = build_teacher(config, teacher, ranks)
    assert provider is not None
    provider.model.shares_tower = config.distillation.share_vision_tower
    window = [tiny.batch_of("v1", packing=True), tiny.batch_of("text", packing=True)]
    facts = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
    for _ in range(2):
        with count_gathered_bytes() as gathered, count_reduced_bytes() as reduced:
            sums = run_optimizer_step(
                engine,
                provider,
                window,
                facts,
                config.distillation,
                ranks,
                Stopwatch(),
                lookahead=config.teacher.lookahead,
            )
    return {"gathered": gathered.total, **reduced, "terms": sums.terms.tolist()}


def _lean(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    if values["zero_optimization"]["stage"] == 3:
        values["zero_optimization"] |= LEAN
    return values


@pytest.mark.parametrize("trained", [{}, {"student__train": ["projector"]}], ids=str)
def test_a_tied_head_is_gathered_like_one_with_a_weight_of_its_own(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    run = vlm.write_run(tmp_path / "run", 2, "gemma3", student__zero_stage=3, **trained)
    config, cluster = load_config(run / "config.yaml"), Cluster(1, 2)
    tied = run_sizes(config)
    head = tied.student.head
    assert tied.student.count("head.") == 0 < head
    whole = replace(tied.student, tensors=tied.student.tensors | {"head.weight": head})
    work = workload(config, cluster, tied.student.shapes.vision_tokens)
    zero = {"stage3_param_persistence_threshold": 1000}
    assert head > 1000
    sent = [
        {
            transfer.name: transfer.bytes
            for transfer in run_traffic(config, sizes, work, cluster, Rendered(zero, None))
        }
        for sizes in (tied, replace(tied, student=whole))
    ]
    name = "student's weights, at most"
    assert sent[0][name] == sent[1][name] > 0


@pytest.mark.parametrize(
    ("stage", "placement", "lookahead", "share", "tolerance", "trained"),
    [
        (0, "replicated", None, True, 0.02, {}),
        (2, "zero3", None, True, 0.02, {}),
        (2, "zero3", 1, True, 0.02, {}),
        (1, "replicated", None, True, 0.02, {}),
        (3, "replicated", None, True, 0.02, {}),
        # CLIP's code accesses its patch embedding from outside the module, so ZeRO-3 gathers it once more:
        # a large part of this tiny tower.
        (3, "replicated", None, False, 0.1, {}),
        (2, "replicated", None, True, 0.02, {"student__train": ["projector"]}),
        (3, "replicated", None, True, 0.02, {"student__train": ["projector"]}),
        (3, "replicated", None, True, 0.02, {"student__lora": {"rank": 8, "alpha": 8}}),
    ],
)
def test_gathers_and_reductions_agree_with_real_engines(
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    placement: str,
    lookahead: int | None,
    share: bool,
    tolerance: float,
    trained: dict[str, Any],
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        teacher__placement=placement,
        teacher__lookahead=lookahead,
        distillation__share_vision_tower=share,
        **trained,
    )
    config, cluster = load_config(run / "config.yaml"), Cluster(1, 2)
    sizes = run_sizes(config)
    work = workload(config, cluster, sizes.student.shapes.vision_tokens)
    assert work.accumulation == 2
    files = [_lean(run / "ds" / f"{name}.json") for name in ("student", "teacher")]
    rendered = Rendered(*(None if file is None else file["zero_optimization"] for file in files))
    transfers = run_traffic(config, sizes, work, cluster, rendered)
    predicted = sum(transfer.bytes for transfer in transfers if transfer.name != "gradients")
    (gradients,) = (transfer for transfer in transfers if transfer.name == "gradients")
    all_reduced = gradients.bytes if gradients.passes == 2 else 0
    for measured in two_ranks.run(sent_in_a_step, str(run)):
        assert measured["gathered"] == pytest.approx(predicted, rel=tolerance), transfers
        assert measured["all_reduce"] == pytest.approx(all_reduced, rel=0.02), transfers
        scattered = gradients.bytes - all_reduced
        assert measured["reduce_scatter_tensor"] == pytest.approx(scattered, rel=0.02), transfers


def test_a_kept_head_saves_its_gather_and_changes_no_loss(two_ranks: RankPool, tmp_path: Path) -> None:
    found = []
    for keep in (True, False):
        run = tiny.write_run(tmp_path / str(keep), 2, teacher__keep_head=keep)
        found.append((load_config(run / "config.yaml"), two_ranks.run(sent_in_a_step, str(run))))
    (config, kept), (changed, anew) = found
    sizes, cluster = run_sizes(config), Cluster(1, 2)
    teacher = sizes.teacher
    assert teacher is not None
    for one, other in zip(kept, anew, strict=True):
        assert one["terms"] == other["terms"]
        assert other["gathered"] - one["gathered"] == pytest.approx(teacher.head * 4, rel=0.001)
    for planned, phases in ((config, ["always"]), (changed, ["teacher", "student"])):
        parts = teacher_weights(planned, sizes, cluster, Rendered({}, LEAN))
        heads = [part for part in parts if part.name.startswith("teacher's head")]
        assert [part.phase for part in heads] == phases
        assert {part.bytes for part in heads} == {teacher.head * 4}


def test_rings_send_a_share_of_the_bytes_to_each_rank_and_node() -> None:
    everywhere = Transfer("x", 800, ranks=8, nodes=2)
    assert (everywhere.received_by_rank, everywhere.entering_node) == (700, 400)
    inside = Transfer("x", 800, ranks=4, nodes=1)
    assert (inside.received_by_rank, inside.entering_node) == (600, 0)
    reduced = Transfer("x", 800, ranks=8, nodes=2, passes=2)
    assert (reduced.received_by_rank, reduced.entering_node) == (1400, 800)
