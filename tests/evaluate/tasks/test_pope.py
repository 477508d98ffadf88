import json
import os
from pathlib import Path

import pytest

from alignkd.errors import UserError
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.tasks.pope import questions, says_yes, score
from tests.evaluate.benchmark_files import answers, write_lines

INSTRUCTION = "\nAnswer the question using a single word or phrase."
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
# Split -> labels of its questions, two for each image.
LABELS = {
    "adversarial": ["yes", "no", "yes", "no"],
    "random": ["yes", "no"],
    "popular": ["no", "no", "yes", "yes"],
}


def asked():
    for split, labels in LABELS.items():
        for number in range(1, len(labels) + 1):
            yield split, number, f"i{(number - 1) // 2}.jpg", f"Is there a {split} {number}?"


def write_labels(folder, **changes):
    for split, labels in LABELS.items():
        rows = [
            {"question_id": number, "image": image, "text": text, "label": labels[number - 1]}
            for name, number, image, text in asked()
            if name == split
        ]
        rows[0] |= changes.get(split, {})
        # Another order than the questions: the original pairs by position, we by id.
        write_lines(folder / f"coco_pope_{split}.json", reversed(rows))


@pytest.fixture
def data(tmp_path):
    write_lines(
        tmp_path / "pope" / "llava_pope_test.jsonl",
        [
            {
                "question_id": OFFSETS[split] + number,
                "image": image,
                "text": text + INSTRUCTION,
                "category": split,
            }
            for split, number, image, text in asked()
        ],
    )
    write_labels(tmp_path / "pope" / "coco")
    return tmp_path


def given(texts):
    """Answers in the order of the questions."""
    rows = zip(asked(), texts, strict=True)
    return [(OFFSETS[split] + number, text + INSTRUCTION, said) for (split, number, _, text), said in rows]


def table(found):
    return {
        split: {name: round(estimate.value, 4) for name, estimate in numbers.estimates.items()}
        for split, numbers in found.categories["split"].items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("yes, there is", True),
        ("No", False),
        ("no", False),
        ("No, there is not", False),
        ("There is not", False),
        ("Yes. No dog", True),  # the first sentence counts
        ("Sure, no,", False),
        ("NO", True),  # only these three spellings
        ("Not really", True),
        ("nothing", True),
        ("no\nyes", True),  # split at spaces only
        ("", True),
    ],
)
def test_everything_without_a_no_is_a_yes(text, expected):
    assert says_yes(text) is expected


def test_score_worked_out_by_hand(data, tmp_path):
    said = ["Yes", "Yes", "No", "No", "Yes", "No", "Yes", "No", "Yes", "No"]
    found = score(data, answers(tmp_path, given(said)))
    assert table(found) == {
        # one of each: precision 1/2, recall 1/2
        "adversarial": {"f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_ratio": 50},
        "random": {"f1": 100, "accuracy": 100, "precision": 100, "recall": 100, "yes_ratio": 50},
        # 1 true yes, 1 false yes, 1 true no, 1 false no
        "popular": {"f1": 50, "accuracy": 50, "precision": 50, "recall": 50, "yes_ratio": 50},
    }
    assert found.score.value == pytest.approx(200 / 3)
    assert found.overall.estimates["accuracy"].value == pytest.approx(60)
    assert found.overall.questions == 10
    assert sum(found.right.values()) == 6
    # Without image i0: F1 of 0 (adversarial), 0 (random is gone), 2/3 (popular). Without i1: 2/3, 1, 0.
    without = (100 * (2 / 3) / 3, 100 * (2 / 3 + 1) / 3)
    assert found.score.standard_error == pytest.approx(abs(without[0] - without[1]) / 2)
    assert found.notes == ("10 questions; the published file has 8,910",)


def test_yes_ratio_counts_answers_not_labels_and_precision_is_not_recall(data, tmp_path):
    found = score(data, answers(tmp_path, given(["Yes"] * 4 + ["Yes", "No"] + ["No", "No", "No", "Yes"])))
    assert [row["yes_ratio"] for row in table(found).values()] == [100, 50, 25]
    assert [row["precision"] for row in table(found).values()] == [50, 100, 100]
    assert [row["recall"] for row in table(found).values()] == [100, 100, 50]
    assert found.overall.estimates["yes_ratio"].value == 60


def test_model_that_always_says_no_scores_zero_instead_of_failing(data, tmp_path):
    found = score(data, answers(tmp_path, given(["No"] * 10)))
    assert found.score.value == 0
    assert table(found)["random"] == {"f1": 0, "accuracy": 50, "precision": 0, "recall": 0, "yes_ratio": 0}


def test_model_that_always_says_yes(data, tmp_path):
    found = score(data, answers(tmp_path, given(["Yes"] * 10)))
    assert found.score.value == pytest.approx(200 / 3)
    assert found.overall.estimates["yes_ratio"].value == 100


def test_files_may_lie_flat_in_the_folder_itself(data, tmp_path):
    write_labels(tmp_path / "pope")
    for file in (tmp_path / "pope" / "coco").iterdir():
        file.unlink()
    file = answers(tmp_path, given(["No"] * 10))
    assert score(tmp_path / "pope", file).score == score(tmp_path, file).score


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"text": "Is there a car?"}, "'Is there a car\\?'"),
        ({"image": "i9.jpg"}, "'i9.jpg'"),
        ({"question_id": 77}, "no such id"),
    ],
)
def test_labels_of_another_release_are_refused_and_the_right_commit_named(data, tmp_path, change, found):
    write_labels(tmp_path / "pope" / "coco", random=change)
    commit = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
    message = f"does not agree with the labels of the random split .*{found}.*{commit}"
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, given(["No"] * 10)))


def test_answers_to_another_release_are_refused(data, tmp_path):
    rows = given(["No"] * 10)
    rows[4] = (rows[4][0], "Is there a boat?" + INSTRUCTION, "No")
    with pytest.raises(
        UserError, match=r"line 5: asked 'Is there a boat\?.*the answers are to another release"
    ):
        score(data, answers(tmp_path, rows))


def test_too_few_answers_are_an_error(data, tmp_path):
    with pytest.raises(UserError, match="4 of the 10 questions of pope have no answer, first '20000001'"):
        score(data, answers(tmp_path, given(["No"] * 10)[:6]))


def test_some_splits_alone_are_scored_with_a_note(data, tmp_path):
    lines = (tmp_path / "pope" / "llava_pope_test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pope" / "llava_pope_test.jsonl").write_text("".join(lines[4:6]))
    (tmp_path / "pope" / "coco" / "coco_pope_popular.json").unlink()
    found = score(data, answers(tmp_path, given(["Yes", "No"] * 5)[4:6]))
    assert found.score.value == 100
    assert found.score.standard_error is None
    assert found.notes[1] == "the mean F1 is over random only: no question is of another split"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"category": "easy"},
            "line 1: `category` must be one of adversarial, random, popular, found 'easy'",
        ),
        ({"question_id": "x1"}, "line 1: `question_id` must be a whole number"),
        ({"text": None}, "line 1: `text` must be a text"),
    ],
)
def test_broken_questions_are_one_error(data, tmp_path, change, message):
    file = tmp_path / "pope" / "llava_pope_test.jsonl"
    write_lines(file, [json.loads(file.read_text().splitlines()[0]) | change])
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, given(["No"] * 10)))


def test_label_must_be_yes_or_no(data, tmp_path):
    write_labels(tmp_path / "pope" / "coco", popular={"label": "maybe"})
    with pytest.raises(
        UserError, match=r"coco_pope_popular.json: line 4: `label` must be yes or no, found 'maybe'"
    ):
        score(data, answers(tmp_path, given(["No"] * 10)))


def test_questions_are_asked_as_published(data, tmp_path):
    (tmp_path / "pope" / "val2014").mkdir()
    found = questions(data)
    assert len(found) == 10
    assert found[4].question_id == 10_000_001
    assert found[4].prompt == "<image>\nIs there a random 1?" + INSTRUCTION
    assert found[4].category == "random"
    assert str(found[4].pictures[0]) == str(tmp_path / "pope" / "val2014" / "i0.jpg")


# LLaVA's public files are not ours to copy: this runs where ALIGNKD_POPE names a folder that holds them.
if FOLDER := os.environ.get("ALIGNKD_POPE"):

    def test_public_answers_of_llava_give_the_published_score():
        (file,) = Path(FOLDER).glob("answers_llava-v1.5-13b.jsonl*")
        found = score(Path(FOLDER), read_answers(file))
        assert round(found.score.value, 2) == 85.95
        assert {split: round(row["f1"], 2) for split, row in table(found).items()} == {
            "adversarial": 84.46,
            "popular": 86.25,
            "random": 87.14,
        }
        assert found.notes == ()
