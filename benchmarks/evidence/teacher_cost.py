"""What a sweep saves by asking the teacher once: ``python -m benchmarks.evidence.teacher_cost``.

The condition "all" is trained for some steps in turns with the kept targets and with a teacher that runs in
every step, as without a cache; and the targets of all training samples are computed once, as a sweep's first
run does. CPU seconds of one thread, so other programs disturb them little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.models.adapters import seeded_adapters
from alignkd.teacher.targets import TeacherModel, TeacherTargets
from benchmarks import report
from benchmarks.evidence import records
from benchmarks.evidence.bench import Bench, open_bench
from benchmarks.evidence.conditions import CONDITIONS, TOP_K
from benchmarks.evidence.loop import Distillation, Examples, Source, train
from benchmarks.evidence.models import load_teacher, new_student, takes_patches
from benchmarks.evidence.run import Settings
from benchmarks.evidence.targets import standard_forward
from benchmarks.evidence.task import Sizes

ROUNDS = 3
ALONE, KEPT, ASKED = "student alone", "all terms, targets kept", "all terms, teacher in every step"


@dataclass(frozen=True)
class AskedEachStep:
    """The teacher's side of a batch without a cache. Its tower has run already, as the student's."""

    teacher: TeacherModel
    examples: Examples
    head: torch.Tensor

    @torch.no_grad()
    def of(self, numbers: Sequence[int]) -> TeacherTargets:
        return standard_forward(self.teacher, self.examples.batch(numbers))


def asked_each_step(bench: Bench) -> AskedEachStep:
    teacher = takes_patches(load_teacher(bench.cache, bench.teacher_file))
    return AskedEachStep(
        TeacherModel(teacher, TOP_K), bench.examples("train", TOP_K), teacher.head.weight.detach().clone()
    )


def train_some(bench: Bench, source: Source | None, steps: int) -> None:
    """``steps`` of a run; without ``source`` of the student alone."""
    section = CONDITIONS["all" if source is not None else "alone"].section()
    student = new_student(bench.cache, 0)
    adapters = distillation = None
    if source is not None:
        teacher = load_teacher(bench.cache, bench.teacher_file)
        adapters = seeded_adapters(teacher.facts, student.facts, 0)
        distillation = Distillation(source, term_weights(section))
    module = StudentStep(student, adapters, section)
    train(module, bench.examples("train", section.top_k), Settings().training(0), steps, distillation)


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.teacher_cost", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measured = report.facts(arguments)
    with tempfile.TemporaryDirectory(prefix="alignkd-evidence-") as folder:
        bench = open_bench(Path(folder), Sizes())
        live = asked_each_step(bench)
        once = cpu_seconds(lambda: bench.targets(None))
        kept = bench.targets(None).with_top_k(TOP_K)
        sources: dict[str, Source | None] = {ALONE: None, KEPT: kept, ASKED: live}
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(ROUNDS):
            for name, source in sources.items():
                took = cpu_seconds(partial(train_some, bench, source, options.steps))
                seconds[name].append(took / options.steps)
    text = body(seconds, once)
    results = {"seconds_per_step": seconds, "targets_once": once}
    if options.publish:
        report.publish("evidence", measured, text, results)
    print(report.section("evidence", measured, text))


def body(seconds: dict[str, list[float]], once: float) -> str:
    """``seconds``: of a step, by round; ``once``: to compute the targets of all training samples."""
    steps = Settings().steps
    per_step = {name: statistics.median(values) for name, values in seconds.items()}
    table = report.table(
        ["a run", "CPU ms/step", f"CPU s, {steps} steps"],
        [[name, f"{1000 * step:.1f}", f"{steps * step:.0f}"] for name, step in per_step.items()],
    )
    with_teacher = [
        record for record in records.read_all(records.RECORDS) if record["condition"]["distillation"]
    ]
    taught = [record["steps"] for record in with_teacher]
    # The targets depend on the teacher and on the kind of attention map.
    stores = {(record.get("better_teacher"), record["condition"]["attention"]) for record in with_teacher}
    kept, asked = (sum(taught) * per_step[name] / 3600 for name in (KEPT, ASKED))
    return (
        f"{table}\n\nThe targets of all training samples, computed once: {once:.0f} CPU s. At these rates\n"
        f"the {len(taught)} runs with a teacher on record ({sum(taught):,} steps) cost "
        f"{kept + len(stores) * once / 3600:.2f} CPU hours with the targets kept,\n"
        f"and {asked:.2f} with the teacher in every step."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
