"""The evidence harness: splits, pairs, variants of the attention term, resuming, and statistics."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkd.config.dotted import flatten
from alignkd.data.collate import Example
from alignkd.data.records import Turn
from alignkd.data.templates import encode, encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.engine.optimizer_step import term_weights
from alignkd.engine.student_step import StudentStep
from alignkd.evaluate.generation import Decoding, Prompt, generate
from alignkd.losses.attention import text_vision_block
from alignkd.losses.total import TERMS
from alignkd.models.adapters import seeded_adapters
from alignkd.models.attention import use_plain_attention
from alignkd.teacher.targets import TeacherModel, block_layout
from benchmarks.evidence import __main__ as program
from benchmarks.evidence import curves, loop, plots, pool, records, run, table, teacher_cost
from benchmarks.evidence.answers import right_answers
from benchmarks.evidence.bench import Bench, open_bench
from benchmarks.evidence.conditions import BASELINE, CONDITIONS, TOP_K
from benchmarks.evidence.loop import Distillation, Examples, Part, order_of_steps, split_step, train
from benchmarks.evidence.models import (
    load_teacher,
    new_student,
    takes_patches,
    train_better_teacher,
    train_teacher,
    write_folders,
)
from benchmarks.evidence.patches import VARIANTS
from benchmarks.evidence.run import Settings, train_once
from benchmarks.evidence.statistics import (
    accuracy,
    gradient_shares,
    mean_accuracy,
    paired_difference,
    steps_to_reach,
)
from benchmarks.evidence.task import (
    CAPTION,
    QUESTION_KINDS,
    Sample,
    Sizes,
    build_task,
    split_digits,
    task_digest,
)
from benchmarks.evidence.teacher_cost import ALONE, ASKED, KEPT, asked_each_step

SIZES = Sizes(train=64, validation=2, test=2)
SHORT = Settings(steps=2, batch=8)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("evidence")
    task = build_task(write_folders(root), SIZES)
    train_teacher(root, task, 1, root / "teacher.safetensors")
    (root / "better-teacher.safetensors").write_bytes(b"")  # until it is trained
    return open_bench(root, SIZES, root / "teacher.safetensors", root / "better-teacher.safetensors")


@pytest.fixture(scope="module")
def record(bench: Bench) -> dict[str, Any]:
    return train_once(bench, CONDITIONS["all"], 3, SHORT)


def parts_of(bench: Bench, name: str) -> tuple[StudentStep, list[Part], torch.Tensor]:
    """One step of a condition with all its terms: the first sixteen samples of each sort."""
    condition = CONDITIONS[name]
    section, variant = condition.section(), VARIANTS.get(condition.attention or "")
    targets = bench.targets(condition.attention).with_top_k(section.top_k)
    student = new_student(bench.cache, 0)
    teacher = load_teacher(bench.cache, bench.teacher_file)
    module = StudentStep(student, seeded_adapters(teacher.facts, student.facts, 0), section)
    elements = None if variant is None else variant.elements
    distillation = Distillation(targets, term_weights(section), condition.labels_only, elements)
    numbers = [*range(16), *range(32, 48)]
    return module, split_step(module, bench.examples("train", TOP_K), numbers, distillation), targets.head


def test_no_digit_image_is_in_two_splits() -> None:
    images = [{digit.tobytes() for digit in digits.pixels} for digits in split_digits()]
    assert [len(some) for some in images] == [1078, 269, 450]
    assert not images[0] & images[1]
    assert not images[0] & images[2]
    assert not images[1] & images[2]


def test_splits_hold_every_kind_and_no_grid_twice(bench: Bench) -> None:
    for samples in (bench.task.validation, bench.task.test):
        kinds = [sample.kind for sample in samples]
        assert {kind: kinds.count(kind) for kind in QUESTION_KINDS} == {
            **dict.fromkeys(QUESTION_KINDS, 2),
            "text": 25,
        }
        shown = [grid for sample in samples for grid in sample.grids]
        assert len(shown) == len(set(shown))
    used = [
        {grid for sample in samples for grid in sample.grids}
        for samples in (bench.task.train, bench.task.validation, bench.task.test)
    ]
    assert not used[0] & used[1]
    assert not used[1] & used[2]
    assert not used[0] & used[2]
    assert [sample.kind for sample in bench.task.train].count(CAPTION) == 32


def test_other_data_have_another_digest_and_folder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    task = bench.task
    sample, root = task.test[0], bench.cache.parent
    ids, labels = sample.example.ids, sample.example.labels
    changed = (
        replace(sample, kind="row"),
        replace(sample, example=replace(sample.example, ids=[*ids[:-1], 5])),
        replace(sample, example=replace(sample.example, labels=[*labels[:-1], 5])),
        replace(sample, grids=(0,)),
    )
    tasks = [replace(task, test=(one, *task.test[1:])) for one in changed]
    tasks += [replace(task, pixels=task.pixels + 1), replace(task, validation=task.test)]
    digests = {task_digest(one) for one in (task, *tasks)}
    assert len(digests) == 7
    monkeypatch.setattr("benchmarks.evidence.bench.build_task", lambda *_: tasks[-1])
    other = open_bench.__wrapped__(root, SIZES, bench.teacher_file, bench.better_file)
    assert other.data == task_digest(tasks[-1])
    assert other.cache != bench.cache


def test_all_conditions_of_a_seed_see_the_same_samples_in_the_same_order() -> None:
    order = order_of_steps(64, 8, 12, seed=1)
    assert order == order_of_steps(64, 8, 24, seed=1)[:12]
    assert order != order_of_steps(64, 8, 12, seed=2)
    assert sorted(number for step in order[:8] for number in step) == list(range(64))


def test_kept_targets_are_those_of_the_teacher_on_the_batch(bench: Bench) -> None:
    numbers = [40, 3, 33]
    batch = bench.examples("train").batch(numbers)
    teacher = TeacherModel(takes_patches(load_teacher(bench.cache, bench.teacher_file)), TOP_K)
    expected, found = teacher(batch), bench.targets(None).with_top_k(TOP_K).of(numbers)
    rows = expected.block_IHMV.shape[2]
    assert torch.equal(found.focus_indices_IK, expected.focus_indices_IK)
    torch.testing.assert_close(found.hidden_ND, expected.hidden_ND)
    torch.testing.assert_close(found.block_IHMV[:, :, :rows], expected.block_IHMV)
    torch.testing.assert_close(found.vision_tokens_IVD, expected.vision_tokens_IVD)
    assert not found.block_IHMV[:, :, rows:].any()


def test_the_cost_of_a_teacher_is_measured_on_the_targets_that_are_kept(bench: Bench) -> None:
    numbers = [40, 3, 33]
    found, kept = asked_each_step(bench).of(numbers), bench.targets(None).with_top_k(TOP_K).of(numbers)
    torch.testing.assert_close(found.hidden_ND, kept.hidden_ND)
    assert torch.equal(found.focus_indices_IK, kept.focus_indices_IK)

    seconds = {ALONE: [0.03, 0.04, 0.9], KEPT: [0.05, 0.04, 0.9], ASKED: [0.08, 0.07, 0.9]}
    text = teacher_cost.body(seconds, 14.2)
    assert "| all terms, targets kept | 50.0 | 100 |" in text
    assert "| all terms, teacher in every step | 80.0 | 160 |" in text
    assert "computed once: 14 CPU s" in text


def test_patches_in_the_place_of_pixels_give_the_same_student(bench: Bench) -> None:
    pixels = Examples(bench.task.train, bench.task.pixels).batch([0, 33])
    with torch.no_grad():
        student = new_student(bench.cache, 0)
        expected = load_teacher(bench.cache, bench.teacher_file).patches(pixels.pixel_values)
        torch.testing.assert_close(
            student.patches(bench.examples("train").batch([0, 33]).pixel_values), expected
        )


def test_an_answer_is_right_exactly_when_generation_gives_it(bench: Bench) -> None:
    tokenizer = SentencePieceTokenizer.from_folder(bench.cache / "student")
    asked = Turn("human", "What is 1 plus 2?")

    def examples(answers: list[str]) -> Examples:
        encoded = [encode((asked, Turn("gpt", answer)), "v1", tokenizer) for answer in answers]
        samples = [Sample("text", Example(one.ids, one.labels, ()), ()) for one in encoded]
        return Examples(samples, bench.patches)

    student = new_student(bench.cache, 0)
    module = StudentStep(student, None, CONDITIONS[BASELINE].section())
    memorised = replace(SHORT, learning_rate=1e-2).training(0)
    train(module, examples(["4 4"] * 8), memorised, 30)
    candidates = ["", "4", "4 4", "4 4 4", "top left", "3 4"]
    found = right_answers(student, examples(candidates))
    use_plain_attention(student.language_model)
    prompt = Prompt(encode_prompt((asked,), "v1", tokenizer))
    generated = generate(student.eval(), tokenizer, [prompt], None, Decoding(8))[0].strip()
    assert generated == "4 4"
    assert found == [answer == generated for answer in candidates]


def test_the_transposed_term_sends_the_student_no_gradient(bench: Bench) -> None:
    module, (part,), head = parts_of(bench, "transposed attention")
    scales = (0.0, 0.0, part.scales[2], 0.0, 0.0)
    assert module.adapters is not None
    with VARIANTS["transposed"].for_student(module.student):
        output = module(part.batch, scales, part.targets, head)
    output.loss.backward()
    assert output.sums[2] / (1 / part.scales[2]) == pytest.approx(
        float(module.adapters.attention.bias.detach().square().mean())
    )
    gradients = [parameter.grad for parameter in module.student.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["text-text attention", "every row", "last layer", "attention, row KL"])
def test_a_variant_of_the_attention_term_teaches_the_layer_that_it_reads(bench: Bench, name: str) -> None:
    variant = VARIANTS[str(CONDITIONS[name].attention)]
    module, (part,), head = parts_of(bench, name)
    with variant.for_student(module.student):
        module(part.batch, (0.0, 0.0, part.scales[2], 0.0, 0.0), part.targets, head).loss.backward()
    taught = [
        float(layer.self_attn.q_proj.weight.grad.norm()) for layer in module.student.language_model.layers
    ]
    assert (taught[0] > 0, taught[1] > 0) == ((True, True) if name == "last layer" else (True, False))


def test_every_row_counts_what_a_row_sees_of_the_image(bench: Bench) -> None:
    variant = VARIANTS["every row"]
    module, (part,), _ = parts_of(bench, "every row")
    assert part.targets is not None
    ours = variant.layout(block_layout(part.batch, module.student.facts))
    query_BHLE, key_BGLE, scaling = module.student(part.batch).first_layer
    seen_IHMV = text_vision_block(query_BHLE, key_BGLE, scaling, ours) > 0
    assert int(seen_IHMV.sum()) == variant.elements(part.batch, seen_IHMV.shape[1])
    teacher_IHMV = part.targets.block_IHMV[:, :1, : seen_IHMV.shape[2]]
    assert torch.equal(teacher_IHMV > 0, seen_IHMV[:, :1])
    text_rows = part.batch.text_rows_IM.shape[1]
    assert seen_IHMV[:, :, :-text_rows].sum() == len(ours.places) * seen_IHMV.shape[1] * 16 * 17 // 2


def test_the_last_layer_is_read_only_inside_the_variant(bench: Bench) -> None:
    module, (part,), _ = parts_of(bench, "all")
    before = module.student(part.batch).first_layer.query_BHLE
    with VARIANTS["last layer"].for_student(module.student):
        assert not torch.equal(module.student(part.batch).first_layer.query_BHLE, before)
    assert torch.equal(module.student(part.batch).first_layer.query_BHLE, before)


def test_kinds_without_a_teacher_are_a_micro_batch_of_labels(bench: Bench) -> None:
    _, whole, _ = parts_of(bench, "all")
    _, parts, _ = parts_of(bench, "labels on hard kinds")
    assert len(whole) == 1
    assert len(parts) == 2
    taught, alone = parts
    assert alone.targets is None
    assert alone.scales[1:] == (0.0, 0.0, 0.0, 0.0)
    assert taught.scales[0] == alone.scales[0] == whole[0].scales[0]
    assert taught.scales[1] == pytest.approx(1 / taught.batch.counts.logits)
    assert taught.batch.counts.supervised + alone.batch.counts.supervised == whole[0].batch.counts.supervised


def test_only_the_adapters_condition_leaves_them_as_they_were(bench: Bench) -> None:
    def change(frozen: bool) -> float:
        module, *_ = parts_of(bench, "all")
        assert module.adapters is not None
        module.adapters.requires_grad_(not frozen)
        before = module.adapters.vision.weight.detach().clone()
        source = bench.targets(None).with_top_k(TOP_K)
        distillation = Distillation(source, term_weights(CONDITIONS["all"].section()))
        train(module, bench.examples("train", TOP_K), SHORT.training(0), 2, distillation)
        return float((module.adapters.vision.weight.detach() - before).abs().max())

    assert change(frozen=False) > 0
    assert change(frozen=True) == 0


def test_a_record_says_how_it_was_made_and_what_came_out(record: dict[str, Any], bench: Bench) -> None:
    assert record["condition"] == CONDITIONS["all"].as_dict()
    assert record["seed"] == 3
    assert record["teacher"] == bench.teacher
    assert record["data"] == bench.data == task_digest(bench.task)
    assert record["steps"] == 2
    assert {kind: len(flags) for kind, flags in record["test"].items()} == {
        **dict.fromkeys(QUESTION_KINDS, 2),
        "text": 25,
    }
    assert [look["step"] for look in record["validation"]] == [1, 2]
    assert record["clipped"] == 1.0
    norms = record["gradient_norms"][0]["norms"]
    assert norms["ce"]["layer 0 queries and keys"] > norms["attention"]["layer 0 queries and keys"] > 0
    assert norms["attention"]["layer 1 rest"] == 0 < norms["divergence"]["layer 1 rest"]
    assert norms["vision_all"]["projector"] > 0 == norms["vision_all"]["layer 0 rest"]
    json.dumps(record)


def test_the_better_teacher_has_the_same_tower_and_teaches_something_else(bench: Bench) -> None:
    train_better_teacher(bench.cache, bench.task, 1, bench.better_file)
    first, better = (load_file(file) for file in (bench.teacher_file, bench.better_file))
    other = {name for name in first if not torch.equal(first[name], better[name])}
    assert other
    assert not any("vision_tower" in name for name in other)
    hidden = [bench.targets(None, which).of([0]).hidden_ND for which in (False, True)]
    assert not torch.equal(*hidden)
    found = train_once(bench, CONDITIONS["all, better teacher"], 3, SHORT)
    wanted = program.wanted(("all, better teacher", 3, SHORT), bench)
    assert {key: found[key] for key in wanted} == wanted
    assert wanted["better_teacher"] == bench.better_teacher != wanted["teacher"] == bench.teacher
    assert "better_teacher" not in program.wanted(("all", 3, SHORT), bench)


def test_the_same_run_gives_the_same_record(record: dict[str, Any], bench: Bench) -> None:
    again = train_once(bench, CONDITIONS["all"], 3, SHORT)
    assert {**again, "seconds": None} == {**record, "seconds": None}


@pytest.mark.parametrize(("name", "expected"), [("all", 2), ("balanced", 102)])
def test_a_run_costs_its_training_steps_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, expected: int
) -> None:
    """A clock that each kind of work moves by an amount of its own; only ``balanced`` pays for gradients."""
    now = 0.0

    def takes(place: object, what: str, seconds: float) -> None:
        done = getattr(place, what)

        def slow(*arguments: Any, **keys: Any) -> Any:
            nonlocal now
            now += seconds
            return done(*arguments, **keys)

        monkeypatch.setattr(place, what, slow)

    clocks = SimpleNamespace(monotonic=lambda: now, process_time=lambda: now)
    monkeypatch.setattr(run, "time", clocks)
    takes(loop, "split_step", 1.0)
    takes(run, "term_gradient_norms", 100.0)
    takes(run, "right_answers", 1e4)
    takes(Bench, "targets", 1e6)
    takes(run, "new_student", 1e6)
    found = train_once(bench, CONDITIONS[name], 3, SHORT)
    assert found["seconds"] == {"wall": expected, "cpu": expected}
    assert len(found["gradient_norms"]) == 2


def test_a_run_of_the_program_goes_on_in_a_process_that_finds_it(tmp_path: Path, bench: Bench) -> None:
    """A spawned process does not import ``__main__`` of a package, so nothing of it may be sent there."""
    assert program.work.__module__ != program.__name__
    opened = partial(open_bench, bench.cache.parent, SIZES, bench.teacher_file, bench.better_file)
    pool.work(opened, program.missing([(BASELINE, 0, SHORT)], tmp_path, bench), tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["alone.0.json"]


def test_finished_runs_are_skipped_and_other_settings_refused(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Here:
        """A pool of no processes."""

        def __init__(self, *arguments: Any) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *arguments: Any) -> None: ...
        def submit(self, function: Any, *arguments: Any) -> Future[str]:
            started.append(arguments[1][:2])
            future: Future[str] = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Here)
    runs = [(BASELINE, seed, SHORT) for seed in (0, 1)]
    pool.work(lambda: bench, program.missing(runs[:1], tmp_path, bench), tmp_path, 1, None)
    pool.work(lambda: bench, program.missing(runs, tmp_path, bench), tmp_path, 1, None)
    assert started == [(BASELINE, 0), (BASELINE, 1)]
    assert program.missing(runs, tmp_path, bench) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.0.json", "alone.1.json"]
    with pytest.raises(ValueError, match="another learning_rate; move it away"):
        program.missing([(BASELINE, 0, replace(SHORT, learning_rate=5e-3))], tmp_path, bench)
    with pytest.raises(ValueError, match="another teacher"):
        program.missing(runs, tmp_path, replace(bench, teacher="another"))
    with pytest.raises(ValueError, match="another data"):
        program.missing(runs, tmp_path, replace(bench, data="another"))
    pool.work(lambda: bench, program.missing([(BASELINE, 2, SHORT)], tmp_path, bench), tmp_path, 1, 0.0)
    assert len(started) == 2  # no time was left


def test_the_sweep_waits_for_the_runs_that_its_settings_are_chosen_by(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    monkeypatch.setattr(program, "open_bench", lambda *_: bench)
    monkeypatch.setattr(program, "work", lambda _, todo, *__: started.append(len(todo)))

    def start(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["evidence", "--cache", str(tmp_path), *words])
        program.main()

    with pytest.raises(SystemExit, match=r"lacks 20 records; .*python -m benchmarks.evidence --tune"):
        start()
    start("--tune")
    assert started == [20]
    *first, last = program.missing(program.tuning_runs(), tmp_path / "tuning", bench)
    for one, path in first:
        records.write(path, program.wanted(one, bench))
    with pytest.raises(SystemExit, match="lacks 1 record;"):
        start()
    records.write(last[1], program.wanted(last[0], bench))
    start("--conditions", BASELINE, "--seeds", "0", "1", "2")
    assert started == [20, 3]


def test_every_condition_has_a_record_name_of_its_own() -> None:
    names = {records.path_of(Path(), name, 0).name for name in CONDITIONS}
    assert len(names) == len(CONDITIONS)
    assert all(condition.attention in (None, *VARIANTS) for condition in CONDITIONS.values())
    assert all(
        condition.section().enabled == (condition.distillation is not None)
        for condition in CONDITIONS.values()
    )


def test_a_change_of_another_condition_is_one_change() -> None:
    changes = {one.name: one.varies for one in CONDITIONS.values() if one.varies is not None}
    assert {changes["frozen adapters"], changes["K 8"], changes["forward KL"]} == {"all"}
    assert changes["attention x 100"] == "attention"
    assert changes["vision, twice the steps"] == "alone, twice the steps"
    for name, other in changes.items():
        ours, theirs = CONDITIONS[name].as_dict(), CONDITIONS[other].as_dict()
        if theirs["distillation"] is not None:  # otherwise the one change is that there is a teacher
            ours, theirs = flatten(ours), flatten(theirs)
        differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)} - {"name"}
        assert len(differing) == 1, name


def test_only_gradients_longer_than_the_limit_are_clipped(bench: Bench) -> None:
    shares = {}
    for clip in (0.0, 1e-3, 1e6):
        module, *_ = parts_of(bench, "all")
        shares[clip] = train(module, bench.examples("train"), SHORT.training(0, clip), 1)
    assert shares == {0.0: 0.0, 1e-3: 1.0, 1e6: 0.0}


def test_balance_changes_the_weights_with_every_measurement(bench: Bench) -> None:
    condition = replace(CONDITIONS["balanced"], balance_every=1)
    (first, second) = train_once(bench, condition, 0, SHORT, with_test=False)["weights"]
    assert first["weights"]["attention"] > 2 < second["weights"]["attention"]
    assert first["weights"] != second["weights"]
    assert first["weights"]["ce"] == second["weights"]["ce"] == 1.0


@pytest.mark.parametrize("labels_only", [(), (CAPTION,)])
def test_weights_that_are_set_before_a_step_count_in_it(bench: Bench, labels_only: tuple[str, ...]) -> None:
    module, *_ = parts_of(bench, "all")
    base = term_weights(CONDITIONS["all"].section())
    distillation = Distillation(bench.targets(None).with_top_k(TOP_K), dict(base), labels_only)
    found: list[list[float]] = []
    wanted: list[list[float]] = []

    def before_step(step: int, parts: list[Part]) -> None:
        distillation.weights["attention"] = 5.0 + step
        for part in parts:
            used = loop.LABELS_ONLY if part.targets is None else base | {"attention": 5.0 + step}
            wanted.append([used[term] / part.elements[term] for term in TERMS])

    module.register_forward_pre_hook(lambda _, arguments: found.append(list(arguments[1])))
    examples = bench.examples("train", TOP_K)
    train(module, examples, SHORT.training(0), 2, distillation, before_step=before_step)
    assert found == wanted
    assert len(found) == (4 if labels_only else 2)


def test_learned_weights_follow_every_step_one_step_late(bench: Bench) -> None:
    three = replace(SHORT, steps=3)
    found = train_once(bench, CONDITIONS["learned weights"], 0, three, with_test=False)
    (start, first, second) = (look["weights"] for look in found["weights"])
    assert start == term_weights(CONDITIONS["learned weights"].section())
    # The attention term is small and its weight rises, by Adam's rate in each of its first steps.
    assert first["attention"] == pytest.approx(math.exp(0.01), rel=1e-6)
    assert second["attention"] == pytest.approx(math.exp(0.02), rel=1e-3)
    assert first["ce"] == second["ce"] == 1.0
    plain = train_once(bench, CONDITIONS["all"], 0, SHORT, with_test=False)
    assert plain["weights"] == []


def test_what_is_learned_from_are_the_means_of_the_last_step_but_one(bench: Bench) -> None:
    module, _, head = parts_of(bench, "all")
    targets = bench.targets(None).with_top_k(TOP_K)
    distillation = Distillation(targets, term_weights(CONDITIONS["all"].section()))
    values: list[float] = []
    learned: list[float] = []

    def before_step(step: int, parts: list[Part]) -> None:
        (part,) = parts
        with torch.no_grad():
            sums = module(part.batch, part.scales, part.targets, head).sums
        values.append(float(sums[TERMS.index("ce")]) / part.elements["ce"])

    train(
        module,
        bench.examples("train", TOP_K),
        SHORT.training(0),
        3,
        distillation,
        before_step=before_step,
        learn=lambda means: learned.append(means["ce"]),
    )
    assert learned == pytest.approx(values[:2])
    assert learned != pytest.approx(values[1:])


def test_the_weights_in_use_are_no_part_of_the_records_of_conditions_without_them() -> None:
    assert CONDITIONS["balanced"].as_dict()["distillation"] == CONDITIONS["all"].as_dict()["distillation"]
    assert CONDITIONS["balanced"].as_dict()["balance_every"] == 50
    assert "balance" not in CONDITIONS["all"].as_dict()["distillation"]
    assert CONDITIONS["learned weights"].as_dict()["distillation"]["balance"] == "learned"


def made_up(seed: int, position: str, text: str, **keys: Any) -> dict[str, Any]:
    return {"seed": seed, "test": {"position": position, "text": text}, **keys}


def test_every_kind_of_question_weighs_the_same() -> None:
    assert accuracy(made_up(0, "1111", "10")) == 0.75
    assert accuracy(made_up(0, "1111", "10"), "text") == 0.5
    mean = mean_accuracy([made_up(0, "1111", "10"), made_up(1, "1111", "00")])
    assert mean.value == 0.625
    assert mean.standard_error == pytest.approx(0.125)
    assert mean.seeds == 2
    assert mean_accuracy([made_up(0, "1", "1")]).standard_error is None


def test_a_difference_pairs_equal_seeds_only() -> None:
    condition = [made_up(0, "1111", "11"), made_up(1, "1111", "00"), made_up(7, "0000", "00")]
    base = [made_up(1, "0000", "00"), made_up(0, "0000", "11"), made_up(8, "1111", "11")]
    paired = paired_difference(condition, base)
    assert paired is not None
    assert (paired.value, paired.low, paired.high, paired.seeds) == (0.5, 0.5, 0.5, 2)
    assert paired_difference(condition[:1], base[:1]) is None


def test_the_interval_covers_questions_and_seeds() -> None:
    """One seed: the binomial interval of the questions. Equal questions: that of the seeds."""
    questions = paired_difference([made_up(0, "10" * 50, "1")], [made_up(0, "00" * 50, "1")], "position")
    assert questions is not None
    assert questions.value == 0.5
    assert questions.low == pytest.approx(0.40, abs=0.02)
    assert questions.high == pytest.approx(0.60, abs=0.02)
    better = [made_up(seed, "1" * 10 if seed < 8 else "0" * 10, "1") for seed in range(16)]
    worse = [made_up(seed, "0" * 10, "1") for seed in range(16)]
    seeds = paired_difference(better, worse, "position")
    assert seeds is not None
    assert seeds.value == 0.5
    assert seeds.low == pytest.approx(0.25, abs=0.07)
    assert seeds.high == pytest.approx(0.75, abs=0.07)


def look(step: int, right: float, **norms: Any) -> dict[str, Any]:
    return {"step": step, "accuracy": {"position": right, "text": right}, "norms": norms}


def test_steps_to_reach_the_end_of_the_baseline() -> None:
    base = {"validation": [look(100, 0.2), look(200, 0.6)]}
    assert steps_to_reach({"validation": [look(100, 0.6), look(200, 0.1)]}, base) == 100
    assert steps_to_reach({"validation": [look(100, 0.3), look(200, 0.5)]}, base) is None


def test_gradient_shares_are_relative_to_the_labels() -> None:
    looks = [
        look(0, 0, ce={"head": 2.0, "layer": 0.0}, attention={"head": 1.0, "layer": 1.0}),
        look(1, 0, ce={"head": 4.0, "layer": 0.0}, attention={"head": 1.0, "layer": 1.0}),
    ]
    assert gradient_shares([{"gradient_norms": looks}]) == {"head": {"attention": (0.25, 0.5)}}


def test_the_tables_hold_what_the_records_say(tmp_path: Path, record: dict[str, Any]) -> None:
    alone = {**record, "condition": CONDITIONS[BASELINE].as_dict(), "gradient_norms": []}
    groups = table.by_condition([record, alone])
    assert list(groups) == [BASELINE, "all"]
    text = table.tables(groups, [alone], [])
    assert "| all | all terms, unit weights, lambda 0.1 | 1 |" in text
    assert "+0.0 [+0.0, +0.0] | 1 | 1 (1 of 1) |" in text
    assert "each term, at the weights of the run (lambda 0.1), over that of the labels" in text
    assert "| layer 0 queries and keys |" in text
    assert f"| 2 | {SHORT.learning_rate:g} | 1 |" in text
    plots.plot_differences(groups, tmp_path / "accuracy.svg")
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()


def made_of(name: str, seed: int, *right: float) -> dict[str, Any]:
    """The record of a run that validates so well after each 100 steps."""
    looks = [look(100 * number, value) for number, value in enumerate(right, start=1)]
    found = {"condition": CONDITIONS[name].as_dict(), "steps": 100 * len(right), "validation": looks}
    return made_up(seed, "1", "1") | found


def test_the_tables_say_when_kinds_are_learnt(tmp_path: Path) -> None:
    groups = table.by_condition(
        [
            *(made_of(BASELINE, 0, 0.5, 1.0), made_of(BASELINE, 1, 0.9, 1.0)),
            *(made_of("all", 0, 0.5, 0.5), made_of("all", 1, 0.5, 1.0), made_of("all", 2, 0.0, 0.8)),
            made_of("alone, twice the steps", 0, 1.0, 1.0, 1.0, 1.0),
        ]
    )
    assert curves.rows_of(groups, ["text"]) == [
        [BASELINE, "85.0", "85.0", "200"],
        ["all", "55.0 (-22.5 ± 2.5)", "55.0 (-22.5 ± 2.5)", "not learnt"],
    ]
    groups[BASELINE][0]["validation"][0]["accuracy"]["text"] = 0.9
    assert curves.rows_of(groups, ["position", "text"])[0] == [BASELINE, "90.0", "85.0", "200", "95.0", "100"]
    assert "| all | 55.0 (-27.5 ± 7.5) |" in table.learning(groups)
    plots.plot_curves(groups, "text", (BASELINE, "all", "no clipping"), tmp_path / "sums.svg")
    assert "<svg" in (tmp_path / "sums.svg").read_text()


def test_fresh_seeds_have_a_table_of_their_own() -> None:
    made = [made_of(name, seed, 0.5) for name in (BASELINE, "attention") for seed in (0, 1, 7)]
    found = [one | {"gradient_norms": [], "clipped": 0.0, "seconds": {"cpu": 1.0}} for one in made]
    text = table.tables(table.by_condition(found), [], fresh_seeds=[6, 7])
    before, divider, after = text.partition("**Confirmation**, seeds 7 to 7.")
    assert divider
    assert [line.split(" | ")[2] for line in before.splitlines() if "L_A only" in line] == ["2"]
    assert [line.split(" | ")[2] for line in after.splitlines() if "L_A only" in line] == ["1"]
    assert "Confirmation" not in table.tables(table.by_condition(found[:2]), [], fresh_seeds=[6, 7])


def test_the_document_has_the_tables_of_the_records() -> None:
    document = table.DOCUMENT.read_text(encoding="utf-8")
    for folder, begin, fresh in (
        (records.RECORDS, table.BEGIN, table.FRESH_SEEDS),
        (records.RECORDS / "scenes", table.BEGIN_SCENES, ()),
    ):
        assert table.with_tables(document, folder, begin, fresh) == document, "run benchmarks.evidence.table"


def test_every_curve_that_is_shown_is_of_a_condition() -> None:
    assert {name for names in table.SHOWN_CURVES.values() for name in names} <= CONDITIONS.keys()


def test_a_change_is_compared_with_what_it_changes() -> None:
    found = [
        {**made_up(seed, position, "1"), "condition": CONDITIONS[name].as_dict()}
        for name, position in ((BASELINE, "00"), ("all", "10"), ("frozen adapters", "11"))
        for seed in (0, 1)
    ]
    rows = [
        line for line in table.changes(table.by_condition(found)).splitlines() if line.startswith("| frozen")
    ]
    assert len(rows) == 1
    assert rows[0].startswith("| frozen adapters | all | +25.0 [")
    assert rows[0].endswith("| 2 |")
