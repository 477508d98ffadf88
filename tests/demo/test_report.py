import io
import json
from dataclasses import replace

from rich.console import Console

from alignkd.demo.report import TrainedModel, accuracy_table, cost_table, loss_table, print_report
from alignkd.evaluate.statistics import Estimate
from alignkd.evaluate.task_score import SCORE, Graded, Numbers, mean_score
from alignkd.evaluate.tasks.sample import BASELINE

STEPS = 40


def write_run(folder, terms):
    """A finished run: every term falls by 0.1 a step from its first value."""
    folder.mkdir()
    rows = [
        {"step": step + 1, "samples_per_second": 100.0 + step}
        | {name: first - 0.1 * step for name, first in terms.items()}
        for step in range(STEPS)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"seconds": 90.0, "peak_memory_bytes_per_rank": [300 * 2**20, 200 * 2**20]}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def numbers(score, baseline, count):
    estimates = {SCORE: Estimate(100 * score, 1.0), BASELINE: Estimate(100 * baseline, None)}
    return Numbers(count, estimates)


def accuracy(position, row):
    kinds = {"position": numbers(position, 0.125, 8), "row": numbers(row, 0.5, 2)}
    scored = mean_score("sample", [Graded("0", "0", 1.0), Graded("1", "1", 0.0)])
    return replace(scored, overall=numbers(0.7, 0.2, 10), categories={"kind": kinds})


def models(tmp_path):
    teacher = write_run(tmp_path / "teacher", {"loss": 7.0, "ce": 7.0})
    student = write_run(tmp_path / "student", {"loss": 9.0, "ce": 6.0, "reverse_kl": 5.0})
    return [
        TrainedModel.of_run("teacher", teacher, accuracy(1.0, 0.5)),
        TrainedModel.of_run("student", student, accuracy(0.875, 0.0)),
    ]


def cells(table):
    return [
        [str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)
    ]


def test_accuracy_is_shown_beside_the_baseline(tmp_path):
    assert cells(accuracy_table({model.name: model.score for model in models(tmp_path)})) == [
        ["position", "1.000", "0.875", "0.125", "8"],
        ["row", "0.500", "0.000", "0.500", "2"],
        ["all", "0.700", "0.700", "0.200", "10"],
    ]


def test_losses_are_means_of_ten_steps(tmp_path):
    rows = {row[0]: row[1:] for row in cells(loss_table(models(tmp_path)))}
    # The mean of the first ten is 0.45 below the first value, that of the last ten 3.45.
    assert rows["ce"] == ["6.55 -> 3.55", "5.55 -> 2.55"]


def test_a_term_that_a_run_does_not_have_is_left_empty(tmp_path):
    rows = {row[0]: row[1:] for row in cells(loss_table(models(tmp_path)))}
    assert rows["attention"] == ["", ""]


def test_cost_gives_minutes_and_the_memory_of_each_rank(tmp_path):
    assert cells(cost_table(models(tmp_path)))[0] == ["teacher", "40", "1.5", "120", "300, 200"]


def test_everything_fits_on_a_narrow_terminal(tmp_path):
    output = io.StringIO()
    print_report(models(tmp_path), Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any("position" in line and "0.875" in line for line in lines)
    assert any("300, 200" in line for line in lines)
