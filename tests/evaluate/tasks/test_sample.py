from __future__ import annotations

import pytest

from alignkd.errors import UserError
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.tasks import sample
from tests.evaluate.benchmark_files import answers, write_json

# (kind, expected, answered)
FIVE = [
    ("row", "top", "bottom"),
    ("position", "3", "3"),
    ("position", "3", "4"),
    ("position", "5", "5"),
    ("position", "7", "3"),
]


def write_data(folder, rows):
    """Test questions about one image each, as `alignkd sample-data` writes them."""
    records = [
        {
            "id": f"q{number}",
            "kind": kind,
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich?"},
                {"from": "gpt", "value": expected},
            ],
        }
        for number, (kind, expected, _) in enumerate(rows)
    ]
    write_json(folder / "test.json", records)
    (folder / "images").mkdir(exist_ok=True)
    return folder


def scored(folder, rows):
    file = answers(folder, [(f"q{number}", "Which?", text) for number, (*_, text) in enumerate(rows)])
    return sample.score(write_data(folder, rows), file)


def values(numbers):
    estimates = {name: estimate.value for name, estimate in numbers.estimates.items()}
    return estimates | {"questions": numbers.questions}


def test_scores_equal_those_worked_out_by_hand(tmp_path):
    score = scored(tmp_path, FIVE)
    kinds = {kind: values(numbers) for kind, numbers in score.categories["kind"].items()}
    assert kinds == {
        "position": {"score": 50.0, "most_frequent_answer": 50.0, "questions": 4},
        "row": {"score": 0.0, "most_frequent_answer": 100.0, "questions": 1},
    }
    # The baseline guesses separately for each kind: 2 of 4, and 1 of 1.
    assert values(score.overall) == {"score": 40.0, "most_frequent_answer": 60.0, "questions": 5}


def test_most_frequent_kind_comes_first(tmp_path):
    score = scored(tmp_path, [("b", "1", "1"), ("a", "1", "1"), ("c", "1", "1"), ("c", "1", "1")])
    assert list(score.categories["kind"]) == ["c", "b", "a"]


def test_only_surrounding_white_space_is_ignored(tmp_path):
    rows = [("k", "3", " 3\n"), ("k", "3", "3."), ("k", "top left", "topleft")]
    assert scored(tmp_path, rows).score.value == pytest.approx(100 / 3)


def test_questions_are_found_in_the_folder_or_one_above(tmp_path):
    write_data(tmp_path / "sample", FIVE)
    for data in (tmp_path, tmp_path / "sample"):
        asked = sample.questions(data)
        assert [question.question_id for question in asked] == ["q0", "q1", "q2", "q3", "q4"]
        assert asked[0].prompt == "<image>\nWhich?"
        assert str(asked[0].pictures[0]) == str(tmp_path / "sample" / "images" / "0.png")


def test_a_file_without_questions_is_an_error(tmp_path):
    write_data(tmp_path, FIVE)
    write_json(tmp_path / "test.json", [])
    with pytest.raises(UserError, match="at least one record"):
        sample.questions(tmp_path)


def test_of_a_partial_file_answered_questions_count(tmp_path):
    write_data(tmp_path, FIVE)
    path = answers(tmp_path, [("q0", "Which?", "top"), ("q1", "Which?", "4")]).path
    with pytest.raises(UserError, match="3 of the 5 questions of sample have no answer"):
        sample.score(tmp_path, read_answers(path))
    score = sample.score(tmp_path, read_answers(path, partial=True))
    assert values(score.overall) == {"score": 50.0, "most_frequent_answer": 100.0, "questions": 2}
