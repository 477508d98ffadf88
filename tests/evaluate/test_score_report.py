import io
import json

import pytest
from rich.console import Console

from alignkd.evaluate.score_report import (
    as_json,
    category_tables,
    compare,
    comparison_json,
    comparison_table,
    paper_average,
    paper_table,
)
from alignkd.evaluate.statistics import Estimate, percent
from alignkd.evaluate.task_score import Graded, Numbers, TaskScore, mean_score


def mean(task="gqa", credits=(1, 1, 0), **more):
    graded = [
        Graded(str(number), str(number), credit, ("even" if number % 2 == 0 else "odd",))
        for number, credit in enumerate(credits)
    ]
    return mean_score(task, graded, ("parity",), **more)


def fixed(task, value):
    score = mean(task)
    return TaskScore(task, Numbers(3, {"score": Estimate(value, 1.0)}), {}, score.units, percent, None)


SIX = [
    fixed(name, value)
    for name, value in (
        ("gqa", 60),
        ("sqa", 70),
        ("textvqa", 50),
        ("pope", 85),
        ("mme", 1300),
        ("mmbench", 62),
    )
]


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_json_is_on_the_papers_scale_with_two_decimals():
    found = as_json([mean(settings={"precision": "bf16"}, notes=["3 questions"])])
    assert found == {
        "tasks": {
            "gqa": {
                "score": 66.67,
                "standard_error": 33.333,
                "questions": 3,
                "categories": {
                    "parity": {
                        "even": {"score": 50.0, "standard_error": 50.0, "questions": 2},
                        "odd": {"score": 100.0, "standard_error": None, "questions": 1},
                    }
                },
                "settings": {"precision": "bf16"},
                "notes": ["3 questions"],
            }
        },
        "average": None,
    }
    assert json.loads(json.dumps(found)) == found


def test_numbers_beside_the_score_have_their_own_standard_error():
    score = fixed("mme", 1300)
    score.overall.estimates["cognition"] = Estimate(250.123, 9.87654)
    found = as_json([score])["tasks"]["mme"]
    assert (found["cognition"], found["cognition_standard_error"]) == (250.12, 9.877)


def test_average_takes_a_twentieth_of_mme_and_needs_all_six():
    assert paper_average(SIX) == pytest.approx((60 + 70 + 50 + 85 + 65 + 62) / 6)
    assert as_json(SIX)["average"] == 65.33
    assert paper_average(SIX[1:]) is None


def test_paper_table_has_the_papers_columns_and_a_dash_for_what_is_missing():
    text = shown(paper_table({"teacher": SIX, "student": [SIX[3], fixed("own", 12)]}))
    header, teacher, student = (line for line in text.splitlines() if "model" in line or "0 ± 1.0" in line)
    assert [cell.strip() for cell in header.strip("\u2503").split("\u2503")] == [
        "model", "GQA", "SQA-IMG", "TextVQA", "POPE", "MME", "MMBench-dev", "own", "average",
    ]  # fmt: skip
    assert "1300.0 ± 1.0" in teacher
    assert teacher.split("\u2502")[-2].strip() == "65.3"
    assert [cell.strip() for cell in student.strip("\u2502").split("\u2502")] == [
        "student", "-", "-", "-", "85.0 ± 1.0", "-", "-", "12.0 ± 1.0", "-",
    ]  # fmt: skip


def test_category_tables_show_every_number_and_no_error_where_there_is_none():
    (table,) = category_tables(mean())
    text = shown(table)
    assert "gqa by parity" in text
    assert "50.0 ± 50.0" in text
    assert "100.0 \u2502" in text
    assert category_tables(fixed("pope", 1)) == []


def test_models_are_compared_on_the_tasks_that_both_answered():
    first = [mean("gqa", (1, 1, 1, 1, 0)), mean("sqa")]
    second = [mean("gqa", (1, 1, 1, 0, 0)), mean("pope")]
    (found,) = compare(first, second)
    value = comparison_json(found)
    assert value["difference"] == 20
    assert value["mcnemar"] == {"only_first": 1, "only_second": 0, "p_value": 1.0}
    low, high = value["interval_95"]
    assert 0 <= low <= 20 <= high <= 80
    text = shown(comparison_table("a", "b", [found]))
    assert "a minus b" in text
    assert "+20.00" in text


def test_partly_right_answers_have_no_mcnemar_test():
    (found,) = compare([mean(partly_right=True)], [mean(partly_right=True)])
    assert found.mcnemar is None
    assert comparison_json(found)["mcnemar"] is None
    assert shown(comparison_table("a", "b", [found])).count(" - ") == 3
