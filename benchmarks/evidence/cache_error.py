"""How far rounded hidden states change the logit term: ``python -m benchmarks.evidence.cache_error``.

The evidence's trained teachers run in fp32 on the questions of the validation split. The divergence of a
student from a teacher, and its gradient with respect to all of the student's weights, are computed from the
teacher's hidden states as they are, in fp8 as a cache stores them, and in bf16 to compare with; the forward
KL also from the most likely tokens. Students are untrained, or have been trained for ``--steps`` steps with
all terms.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alignkd.data.batch import Batch
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.losses.logits import (
    Divergence,
    LogitTargets,
    head_logits,
    log_probabilities,
    logit_loss_sums,
)
from alignkd.losses.top_tokens import top_tokens
from alignkd.models.adapters import seeded_adapters
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.teacher.cache_forms import from_fp8, to_fp8
from alignkd.teacher.targets import logit_hidden
from benchmarks import report
from benchmarks.evidence.bench import Bench, open_bench
from benchmarks.evidence.conditions import CONDITIONS
from benchmarks.evidence.loop import Distillation, train
from benchmarks.evidence.models import load_teacher, new_student, takes_patches
from benchmarks.evidence.run import Settings
from benchmarks.evidence.task import Sizes

Form = Callable[[LogitTargets], LogitTargets]  # what a form leaves of targets with exact hidden states


def rounded(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Form:
    def form(exact: LogitTargets) -> LogitTargets:
        assert exact.teacher_hidden_ND is not None
        return replace(exact, teacher_hidden_ND=rounding(exact.teacher_hidden_ND))

    return form


def most_likely(count: int, dtype: torch.dtype) -> Form:
    """``dtype``: that in which log-probabilities are kept. A cache takes fp16."""

    def form(exact: LogitTargets) -> LogitTargets:
        assert exact.teacher_hidden_ND is not None
        assert exact.teacher_weight_WD is not None
        logits_NW = head_logits(exact.teacher_hidden_ND, exact.teacher_weight_WD)
        top = top_tokens(log_probabilities(logits_NW), count)
        top = top._replace(log_probs_NR=top.log_probs_NR.to(dtype))
        return replace(exact, teacher_hidden_ND=None, teacher_weight_WD=None, teacher_top=top)

    return form


ROUNDINGS = {
    "bf16": rounded(lambda hidden_ND: hidden_ND.bfloat16().to(hidden_ND.dtype)),
    "fp8": rounded(lambda hidden_ND: from_fp8(to_fp8(hidden_ND), hidden_ND.dtype)),
}
TOKENS = {
    "16 tokens": most_likely(16, torch.float16),
    "64 tokens": most_likely(64, torch.float16),
    "64 tokens, bf16": most_likely(64, torch.bfloat16),
    "64 tokens, fp32": most_likely(64, torch.float32),
}
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "forward_kl")
SIZES = Sizes(train=4000, validation=80, test=1)
BATCH = 64


@dataclass(frozen=True)
class Term:
    """The divergence of one student: of all positions together, and its gradient."""

    positions: int
    sum: float
    gradient: torch.Tensor  # float64, of all weights in one row


@dataclass(frozen=True)
class Row:
    teacher: str
    student: str
    divergence: str
    per_position: float  # nats
    errors: dict[str, float]  # relative, signed, by form
    cosines: dict[str, float]  # of the gradients


def measured_term(
    student: MobileVLM,
    teacher: MobileVLM,
    batches: Sequence[Batch],
    divergence: Divergence,
    form: Form = lambda exact: exact,
) -> Term:
    """With what ``form`` leaves of the teacher."""
    weights = [value for value in student.parameters() if value.requires_grad]
    gradient = torch.zeros(sum(value.numel() for value in weights), dtype=torch.float64)
    positions, whole = 0, 0.0
    for batch in batches:
        with torch.no_grad():
            hidden_ND = logit_hidden(batch, teacher(batch))
            targets = form(LogitTargets(batch.logit_labels_N, hidden_ND, teacher.head.weight, divergence))
        ours_ND = logit_hidden(batch, student(batch))
        term = logit_loss_sums(ours_ND, student.head.weight, targets)[1]
        parts = torch.autograd.grad(term, weights, allow_unused=True, materialize_grads=True)
        gradient += torch.cat([part.flatten().double() for part in parts])
        positions += len(hidden_ND)
        whole += term.item()
    return Term(positions, whole, gradient)


def compared(
    names: tuple[str, str],
    student: MobileVLM,
    teacher: MobileVLM,
    batches: Sequence[Batch],
    divergence: Divergence,
) -> Row:
    """``names``: of teacher and student."""
    exact = measured_term(student, teacher, batches, divergence)
    forms = ROUNDINGS | (TOKENS if divergence == "forward_kl" else {})
    terms = {name: measured_term(student, teacher, batches, divergence, form) for name, form in forms.items()}
    return Row(
        *names,
        divergence,
        exact.sum / exact.positions,
        {name: term.sum / exact.sum - 1 for name, term in terms.items()},
        {
            name: float(torch.cosine_similarity(term.gradient, exact.gradient, dim=0))
            for name, term in terms.items()
        },
    )


def of_itself(teacher: MobileVLM, batches: Sequence[Batch], divergence: Divergence) -> float:
    """Nats per position between the teacher and itself in fp8, the loss of a student that equals it."""
    term = measured_term(teacher.requires_grad_(True), teacher, batches, divergence, ROUNDINGS["fp8"])
    return term.sum / term.positions


def trained_student(bench: Bench, steps: int, better_teacher: bool) -> MobileVLM:
    """With all terms of the teacher, on the training samples."""
    section = CONDITIONS["all"].section()
    student = new_student(bench.cache, 0)
    teacher = load_teacher(bench.cache, bench.teacher_file)
    module = StudentStep(student, seeded_adapters(teacher.facts, student.facts, 0), section)
    targets = bench.targets(None, better_teacher).with_top_k(section.top_k)
    distillation = Distillation(targets, term_weights(section))
    train(module, bench.examples("train", section.top_k), Settings().training(0), steps, distillation)
    return student


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.cache_error", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of the trained students")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = report.facts(arguments)
    with tempfile.TemporaryDirectory(prefix="alignkd-evidence-") as folder:
        bench = open_bench(Path(folder), SIZES)
        questions = bench.examples("validation")
        numbers = range(len(questions.samples))
        batches = [questions.batch(numbers[start : start + BATCH]) for start in numbers[::BATCH]]
        rows: list[Row] = []
        floors: dict[str, dict[str, float]] = {}
        for name, better_teacher, file in (
            ("teacher", False, bench.teacher_file),
            ("better teacher", True, bench.better_file),
        ):
            assert file is not None
            teacher = takes_patches(load_teacher(bench.cache, file))
            students = {
                "untrained": new_student(bench.cache, 0),
                f"{options.steps:,} steps": trained_student(bench, options.steps, better_teacher),
            }
            for divergence in DIVERGENCES:
                rows += [
                    compared((name, label), student.eval(), teacher, batches, divergence)
                    for label, student in students.items()
                ]
            floors[name] = {kind: of_itself(teacher, batches, kind) for kind in DIVERGENCES}
    print(report.section("cache-error", facts, body(rows, floors)))


def body(rows: Sequence[Row], floors: dict[str, dict[str, float]]) -> str:
    head = ["teacher", "student", "divergence", "nats/position"]
    head += [f"error, {name}" for name in ROUNDINGS] + [f"1 - cosine, {name}" for name in ROUNDINGS]
    lines = [
        [row.teacher, row.student, row.divergence, f"{row.per_position:.4f}"]
        + [f"{row.errors[name]:+.3%}" for name in ROUNDINGS]
        + [f"{1 - row.cosines[name]:.1e}" for name in ROUNDINGS]
        for row in rows
    ]
    of_tokens = [row for row in rows if row.errors.keys() >= TOKENS.keys()]
    tokens_head = ["teacher", "student", "nats/position", *(f"error, {name}" for name in TOKENS)]
    tokens_head += [f"1 - cosine, {name}" for name in TOKENS]
    tokens_lines = [
        [row.teacher, row.student, f"{row.per_position:.4f}"]
        + [f"{row.errors[name]:+.4%}" for name in TOKENS]
        + [f"{1 - row.cosines[name]:.1e}" for name in TOKENS]
        for row in of_tokens
    ]
    told = [
        f"The {teacher} differs from itself in fp8 by {by_kind['reverse_kl']:.1e} (reverse KL) and "
        f"{by_kind['forward_kl']:.1e} (forward KL) nats per position."
        for teacher, by_kind in floors.items()
    ]
    tokens_table = [
        "",
        "Forward KL from the most likely tokens:",
        "",
        report.table(tokens_head, tokens_lines),
    ]
    return "\n".join([report.table(head, lines), "", *told, *(tokens_table if of_tokens else [])])


if __name__ == "__main__":
    main(sys.argv[1:])
