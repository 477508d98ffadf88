"""The step benchmark on tiny models: its methods make the same step, and what does not fit is a row."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chips, report, step
from benchmarks.batches import Shape, random_window
from benchmarks.gpu.sizes import TINY_PAIR as TINY
from benchmarks.measure import Memory
from benchmarks.memory import predicted_peak
from benchmarks.methods import METHODS
from benchmarks.models import PAIRS, PUBLISHED, QUARTER, random_pair
from benchmarks.results import Result, table_head, table_rows
from benchmarks.setting import as_from_cache, new_setting, padding_share

CPU = torch.device("cpu")
MIXED = Shape("mixed", (190, 230, 400))


def results_of(shape: Shape, *methods: str) -> list[Result]:
    return [Result(shape.name, shape.lengths, method) for method in methods]


@pytest.fixture(scope="module")
def measured() -> dict[str, Result]:
    """Every method. That their losses agree is checked before anything is timed."""
    setting = new_setting(*random_pair(TINY, torch.float32, CPU), CPU)
    results = results_of(MIXED, *METHODS)
    step.measure_shape(setting, MIXED, results, budget=0, precision="fp32")
    return {result.method: result for result in results}


def test_every_method_is_timed_in_turns(measured: dict[str, Result]) -> None:
    for method, result in measured.items():
        assert len(result.seconds) == (step.STAND_IN_ROUNDS if method == "stand-in" else step.LEAST_ROUNDS)
        assert min(result.seconds) > 0
        assert result.memory.peak > result.memory.kept > 0


def test_each_device_saves_what_it_is_there_for(measured: dict[str, Result]) -> None:
    kept = {method: result.memory.kept for method, result in measured.items()}
    assert kept["ours"] < 1.1 * kept["ours, two towers"]
    for method in ("ours, head not fused", "ours, attention term not fused", "ours, padded", "stand-in"):
        assert kept[method] > 1.05 * kept["ours"], method
    assert kept["stand-in"] > kept["ours, head not fused"]


def test_padding_and_splits(measured: dict[str, Result]) -> None:
    assert measured["ours"].padding == measured["ours, token budget"].padding == 0
    assert measured["floor"].padding == measured["ours, padded"].padding == pytest.approx(1 - 820 / 1200)
    assert measured["ours"].micro_batches == measured["floor"].micro_batches == 1
    assert measured["ours, token budget"].micro_batches == 3
    window = random_window(Shape("", (190, 200, 400)), packing=False, token_budget=True, device=CPU)
    assert [batch.input_ids_BL.shape for batch in window] == [(2, 200), (1, 400)]
    assert padding_share(window) == pytest.approx(10 / 800)


def test_a_window_is_one_teacher_forward_or_several(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = new_setting(*random_pair(TINY, torch.float32, CPU), CPU)
    forwards: list[int] = []
    setting.teacher.register_forward_hook(lambda *_: forwards.append(1))
    window = random_window(Shape("", (190,) * 3, accumulate=True), True, False, CPU)
    together = setting.means(METHODS["ours"].step(setting, window), window)
    assert len(forwards) == 1
    apart = setting.means(METHODS["ours, look-ahead 1"].step(setting, window), window)
    assert len(forwards) == 1 + 3
    assert together == pytest.approx(apart, rel=1e-5)
    floor = setting.means(METHODS["floor"].step(setting, window), window)
    assert floor == pytest.approx({name: together[name] for name in ("ce", "divergence")}, rel=1e-5)


def test_a_cached_step_reads_the_answers_of_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = new_setting(*random_pair(TINY, torch.float32, CPU), CPU)
    (plain,) = random_window(MIXED, True, False, CPU)
    ours = setting.means(METHODS["ours"].step(setting, [plain]), [plain])
    windows = {}
    for name in ("cached", "cached, top-k"):
        form = METHODS[name].cached
        assert form is not None
        windows[name] = as_from_cache(setting.teacher, [plain], form)
    monkeypatch.setattr(setting.teacher, "forward", lambda *_: pytest.fail("the teacher's layers run"))
    cached = METHODS["cached"].step(setting, windows["cached"])
    assert setting.means(cached, [plain]) == pytest.approx(ours, rel=1e-5)
    setting.forget_gradients()
    setting.teacher.head.weight.data.fill_(torch.nan)  # what is left of it in this form is not looked at
    top = setting.means(METHODS["cached, top-k"].step(setting, windows["cached, top-k"]), [plain])
    assert top == pytest.approx({name: ours[name] for name in ours if name != "divergence"}, rel=1e-5)
    gradients = [parameter.grad for parameter in setting.module.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_methods_that_disagree_are_not_timed() -> None:
    reference = {"ce": 1.0}
    step._check("ours", {"ce": 1.00005, "attention": 3.0}, reference, 1e-4)
    assert reference == {"ce": 1.0, "attention": 3.0}
    with pytest.raises(SystemExit, match=r"stand-in: ce is 1\.001, another method has 1\.0"):
        step._check("stand-in", {"ce": 1.001}, reference, 1e-4)


def test_the_quarter_pair_has_the_proportions_of_the_published() -> None:
    for ours, theirs in ((QUARTER.teacher, PUBLISHED.teacher), (QUARTER.student, PUBLISHED.student)):
        quarter = (theirs.width // 4, theirs.feed_forward // 4, theirs.layers, theirs.heads // 4)
        assert (ours.width, ours.feed_forward, ours.layers, ours.heads) == quarter
    widths = ("hidden_size", "intermediate_size", "num_attention_heads")
    assert QUARTER.tower == PUBLISHED.tower | {key: PUBLISHED.tower[key] // 4 for key in widths}


def test_from_a_cache_all_operations_but_the_teachers_are_left() -> None:
    (batch,) = random_window(MIXED, packing=False, token_budget=False, device=CPU)
    whole = chips.step_flops(QUARTER, batch)
    no_layers = replace(QUARTER, teacher=replace(QUARTER.teacher, layers=0))
    no_teacher = replace(QUARTER, teacher=replace(QUARTER.teacher, layers=0, width=0))
    for head, left in ((True, no_layers), (False, no_teacher)):
        share = chips.cached_share(QUARTER, batch, head)
        assert share == pytest.approx(chips.step_flops(left, batch) / whole)
        assert share < 0.5


def test_each_pair_is_published_in_a_section_of_its_own() -> None:
    assert {name for name, _ in step.SECTIONS} == set(PAIRS)
    assert len(set(step.SECTIONS.values())) == len(PAIRS)
    document = report.DOCUMENT.read_text(encoding="utf-8")
    for name in step.SECTIONS.values():
        assert f"<!-- {name} -->" in document


def test_a_pair_without_a_section_is_not_measured_to_be_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "random_pair", lambda *_: pytest.fail("models are built"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        step.main(["--pair", "published", "--publish"])
    assert ended.value.code == 2
    message = "no section for the pair published on this device; with --publish: small or quarter"
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_predicted_not_to_fit_is_not_run() -> None:
    one = Result("100 x 1", (100,), "stand-in", memory=Memory(kept=700, peak=1000))
    longer = Result("200 x 1", (200,), "stand-in", memory=Memory(kept=700, peak=3000))
    other = Result("200 x 1", (200,), "ours", memory=Memory(kept=1, peak=1))
    several = Result("150 x 4", (150,) * 4, "stand-in")
    assert predicted_peak(several, [other]) is None
    assert predicted_peak(several, [one, other]) == 4 * 1000 * 1.5**2
    assert predicted_peak(several, [one, longer, other]) == min(9000, 4 * 3000 * 0.75)
    several.predicted_peak, several.fits = 2**30, False
    assert step._fitting(None, [], several, lambda _: pytest.fail("not to be run")) is None
    row = table_rows([several], peak=None)[0]
    assert row[3] == "does not fit"
    assert "about 1024" in row
    assert len(row) == len(table_head(None))


def test_no_step_begins_after_the_deadline() -> None:
    setting = new_setting(*random_pair(TINY, torch.float32, CPU), CPU)
    results = results_of(MIXED, "floor", "ours")
    step.measure_shape(setting, MIXED, results, budget=60, precision="fp32", deadline=time.monotonic() - 1)
    assert [(result.seconds, result.memory) for result in results] == [([], None), ([], None)]
    rows = table_rows(results, peak=1e12)
    assert [row[3] for row in rows] == ["no time left", "no time left"]
    assert {len(row) for row in rows} == {len(table_head(1e12))}


def test_the_deadline_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = new_setting(*random_pair(TINY, torch.float32, CPU), CPU)
    results = results_of(MIXED, "floor", "ours")
    clock = iter(range(100))
    monkeypatch.setattr(step.time, "monotonic", lambda: float(next(clock)))
    # A reading before each method's memory, one at the start of the rounds, one before each step.
    step.measure_shape(setting, MIXED, results, budget=60, precision="fp32", deadline=5.0)
    assert [len(result.seconds) for result in results] == [1, 2]


def test_a_run_that_is_ended_keeps_the_shapes_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PAIRS, "tiny", TINY)
    monkeypatch.setitem(step.SECTIONS, (TINY.name, False), "tiny")
    monkeypatch.setattr(step, "limit_memory", lambda: None)  # of this process, for ever
    written: list[tuple[str, set[str]]] = []

    def publish(name: str, facts: Any, body: str, results: list[Result]) -> None:
        written.append((body, {result.shape for result in results}))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(step, "_publish", publish)
    threads = str(torch.get_num_threads())
    arguments = ["--pair", "tiny", "--lengths", "190", "210", "220", "--samples", "1", "--no-mixed"]
    arguments += ["--methods", "floor", "ours", "--budget", "0", "--publish", "--threads", threads]
    with pytest.raises(KeyboardInterrupt):
        step.main(arguments)
    assert [shapes for _, shapes in written] == [{"190 x 1"}, {"190 x 1", "210 x 1"}]
    assert "The run ended before 220 x 1." in written[1][0]
    assert "| 190 x 1 | ours | 0% |" in written[1][0]
    rows = [line.split(" | ") for line in written[1][0].splitlines() if line.startswith("| 190 x 1")]
    assert rows[0][-1] == " |"  # the prediction is of the product's step
    assert float(rows[1][-1].rstrip(" |")) > 0
    assert "measured here before the steps" in written[1][0]
    step.main([*arguments[:-3], "--threads", threads, "--minutes", "0"])
    assert "The run ended before 190 x 1, 210 x 1, 220 x 1." in capsys.readouterr().out


def test_the_plot_is_drawn(tmp_path: Path, measured: dict[str, Result]) -> None:
    from benchmarks.plots import plot_steps

    missing = Result("mixed", MIXED.lengths, "unfit", fits=False)
    late = Result("mixed", MIXED.lengths, "too late")
    plot_steps([*measured.values(), missing, late], tmp_path / "docs" / "steps.svg")
    drawn = (tmp_path / "docs" / "steps.svg").read_text()
    for words in ("stand-in", "does not fit", "further left is better"):
        assert f"<!-- {words}" in drawn or words in drawn
    assert "too late" not in drawn


@pytest.mark.parametrize("ignored", [["--publish"], ["--pair", "small"]], ids=str)
def test_options_without_an_effect_on_other_families_are_refused(
    ignored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        step.main(["--families", "llava", "--minutes", "0", *ignored])
    assert ended.value.code == 2
    assert "no --pair, no --publish" in capsys.readouterr().err
