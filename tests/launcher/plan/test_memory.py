"""Predicted memory against the tensors of real DeepSpeed engines on two ranks."""

from __future__ import annotations

import gc
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignkd.config import Config, load_config
from alignkd.config.schema import LoraSection
from alignkd.distributed.ranks import Ranks
from alignkd.engine.build import build_student_engine, build_teacher
from alignkd.engine.optimizer_step import all_reduce_step_info, run_optimizer_step
from alignkd.engine.signals import StopRequest
from alignkd.engine.stopwatch import Stopwatch
from alignkd.evaluate.live_student import live_student
from benchmarks.measure import LiveBytes
from launcher.plan.memory import Memory, Part, run_memory, student_states
from launcher.plan.plan import Plan, make_plan
from launcher.plan.roofline import CHIPS
from launcher.plan.sharding import Rendered
from launcher.plan.show import show_plan
from launcher.plan.sizes import run_sizes
from launcher.plan.workload import Cluster, workload
from tests import tiny
from tests.held_storages import held_storages
from tests.launcher.plan import test_advice
from tests.launcher.plan.test_activations import worst_batch
from tests.ranks import RankPool

config = test_advice.config  # the fixture: a 7B teacher and a 1.7B student
CLUSTER = Cluster(nodes=1, gpus_per_node=2)
# Large enough for every tensor, small enough not to hide everything else.
BUCKET = 200_000
ONLY_LABELS = (1.0, 0.0, 0.0, 0.0, 0.0)
ALL: dict[str, Any] = {}
PROJECTOR: dict[str, Any] = {"student__train": ["projector"]}
LORA: dict[str, Any] = {"student__lora": {"rank": 4, "alpha": 8}}


def held_bytes_of_engine(ranks: Ranks, run: str) -> dict[str, int]:
    """Bytes that the student's engine holds before an optimizer step (with gradients) and after it."""
    config = load_config(Path(run) / "config.yaml")
    files = json.loads((Path(run) / "ds/student.json").read_text())
    batch = tiny.batch_of(("v1", "text")[ranks.rank])
    before = held_storages()
    engine, _ = build_student_engine(config, files, ranks)
    with_gradients = 0
    for _ in range(2):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(batch, ONLY_LABELS).loss)
            with_gradients = max(with_gradients, _new_bytes(before))
            engine.step()
    return {"with gradients": with_gradients, "after a step": _new_bytes(before)}


def _new_bytes(before: dict[int, int]) -> int:
    time.sleep(0.2)  # gloo's thread lets go of a buffer a moment after the collective
    return sum(size for key, size in held_storages().items() if key not in before)


def small_buckets(run: Path) -> dict[str, Any]:
    """Rewrites ``ds/student.json``, whose buckets are made for large models; returns its ZeRO section."""
    path = run / "ds" / "student.json"
    values: dict[str, Any] = json.loads(path.read_text())
    values["zero_optimization"]["reduce_bucket_size"] = BUCKET
    path.write_text(json.dumps(values))
    zero: dict[str, Any] = values["zero_optimization"]
    return zero


@pytest.mark.parametrize(
    ("stage", "precision", "trained"),
    [
        (0, "bf16", ALL),
        (1, "bf16", ALL),
        (2, "bf16", ALL),
        (3, "bf16", ALL),
        (0, "fp32", ALL),
        (2, "fp32", ALL),
        (2, "bf16", PROJECTOR),
        (3, "bf16", PROJECTOR),
        (2, "bf16", LORA),
        (3, "bf16", LORA),
        (3, "bf16", {**LORA, "student__train": ["language_model"]}),
    ],
)
def test_student_states_agree_with_a_real_engine(
    two_ranks: RankPool, tmp_path: Path, stage: int, precision: str, trained: dict[str, Any]
) -> None:
    run = tiny.write_run(
        tmp_path / "run", 2, student__zero_stage=stage, training__precision=precision, **trained
    )
    config, zero = load_config(run / "config.yaml"), small_buckets(run)
    predicted = {"with gradients": 0, "after a step": 0}
    for part in student_states(config, run_sizes(config), CLUSTER, Rendered(zero, None)):
        if part.phase == "always" and part.name != "gradients":
            predicted["after a step"] += part.bytes
        if part.phase == "always" or (stage == 1 and part.name == "gradient buckets"):
            predicted["with gradients"] += part.bytes  # stage 2 has freed its buckets after backward
        if stage >= 3 and part.name == "gradients":
            predicted["after a step"] += part.bytes  # kept for the next step
    for measured in two_ranks.run(held_bytes_of_engine, str(run)):
        for moment, size in measured.items():
            assert size == pytest.approx(predicted[moment], rel=0.03), (moment, predicted, measured)


def peak_of_a_step(ranks: Ranks, run: str) -> int:
    """The peak bytes of tensors in the second optimizer step, with everything that a run has."""
    config = load_config(Path(run) / "config.yaml")
    student, teacher = (
        json.loads((Path(run) / "ds" / f"{name}.json").read_text()) for name in ("student", "teacher")
    )
    with LiveBytes() as counter:
        engine, _ = build_student_engine(config, student, ranks)
        provider = build_teacher(config, teacher, ranks)
        assert provider is not None
        provider.model.shares_tower = True
        samples, steps = config.training.micro_batch_size, engine.gradient_accumulation_steps()
        window = [worst_batch(samples, config.data.max_length) for _ in range(steps)]
        facts = all_reduce_step_info(window, engine.module.sizes(), StopRequest(), ranks)
        for _ in range(2):
            counter.peak = counter.live
            run_optimizer_step(engine, provider, window, facts, config.distillation, ranks, Stopwatch())
    return counter.peak


@pytest.mark.parametrize(
    ("stage", "precision", "checkpointing", "every", "trained"),
    [
        (2, "bf16", True, 1, ALL),
        (2, "bf16", False, 1, ALL),
        (2, "fp32", True, 1, ALL),
        (3, "bf16", True, 1, ALL),
        (2, "fp32", True, 2, ALL),
        (2, "bf16", False, 1, PROJECTOR),
        (2, "bf16", False, 1, LORA),
        (3, "bf16", True, 1, LORA),
    ],
)
def test_the_peak_of_a_step_agrees_with_a_real_run(
    two_ranks: RankPool,
    tmp_path: Path,
    stage: int,
    precision: str,
    checkpointing: bool,
    every: int,
    trained: dict[str, Any],
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        training__precision=precision,
        training__checkpoint_every_nth_layer=every,
        data__max_length=400,
        training__gradient_checkpointing=checkpointing,
        **trained,
    )
    config, zero = load_config(run / "config.yaml"), small_buckets(run)
    sizes = run_sizes(config)
    work = workload(config, CLUSTER, sizes.student.shapes.vision_tokens)
    teacher = json.loads((run / "ds" / "teacher.json").read_text())["zero_optimization"]
    predicted = run_memory(config, sizes, work, CLUSTER, Rendered(zero, teacher))
    for measured in two_ranks.run(peak_of_a_step, str(run)):
        assert measured == pytest.approx(predicted.peak, rel=0.1), predicted


def test_a_student_that_answers_takes_its_copies(config: Config) -> None:
    def plan_at(stage: int, task: str | None = "pope", lora: LoraSection | None = None) -> Plan:
        changes: dict[str, Any] = {
            "student": config.student.model_copy(update={"zero_stage": stage, "lora": lora}),
            "evaluation": config.evaluation.model_copy(update={"every": 10, "task": task}),
        }
        return make_plan(config.model_copy(update=changes), Cluster(4, 2))

    lora = LoraSection(rank=4, alpha=8)
    whole = plan_at(3).sizes.student.count()
    adapted = plan_at(3, lora=lora).sizes.student.count()
    # The published 1.7B student: 24 layers of 4 matrices of attention and 3 of 2048 x 5632.
    merged = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    for plan, expected in (
        (plan_at(3), 2 * (whole + 2048 * 32000)),  # bf16, the head gathered beside it
        (plan_at(2), 0),
        (plan_at(3, task=None), 0),
        (plan_at(2, lora=lora), 2 * merged + 10 * 2048 * 5632),
        (plan_at(3, lora=lora), 2 * (adapted + merged) + 10 * 2048 * 5632),
    ):
        assert plan.memory.phase_bytes("answers") == expected
        show_plan(plan, None, None, CHIPS["h100"], Console(file=(shown := io.StringIO()), width=80))
        assert ("answers" in shown.getvalue()) == bool(expected)


def copies_of_a_student(ranks: Ranks, run: str) -> int:
    """The peak bytes beside the engine while a model that answers is made of its student. The least of
    several: gloo's thread may hold a gathered tensor for a moment longer."""
    peaks = []
    config = load_config(Path(run) / "config.yaml")
    with LiveBytes() as counter:
        engine, _ = build_student_engine(
            config, json.loads((Path(run) / "ds/student.json").read_text()), ranks
        )
        answering = live_student(config)
        for _ in range(4):
            time.sleep(0.1)
            gc.collect()
            counter.peak = before = counter.live
            answering(engine.module.student)
            peaks.append(counter.peak - before)
    return min(peaks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "trained"), [(2, ALL), (3, ALL), (2, LORA), (3, LORA)])
def test_copies_for_answers_agree_with_a_real_engine(
    two_ranks: RankPool, tmp_path: Path, stage: int, trained: dict[str, Any], precision: str
) -> None:
    run = tiny.write_run(
        tmp_path / "run",
        2,
        student__zero_stage=stage,
        training__precision=precision,
        evaluation__every=1,
        evaluation__task="pope",
        evaluation__task_data=str(tmp_path),
        evaluation__best="accuracy",
        **trained,
    )
    predicted = make_plan(load_config(run / "config.yaml"), CLUSTER).memory.phase_bytes("answers")
    for measured in two_ranks.run(copies_of_a_student, str(run)):
        assert measured == pytest.approx(predicted, rel=0.05, abs=10_000)  # buffers, such as rotary tables


def test_answers_can_be_the_peak() -> None:
    parts = (Part("a", 1), Part("b", 2, "student"), Part("c", 3, "answers"))
    assert (Memory(parts).peak_phase, Memory(parts).peak) == ("answers", 4)
