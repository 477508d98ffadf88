import pytest

from alignkd.errors import UserError
from alignkd.evaluate.tasks.gqa import is_right, questions, score
from tests.evaluate.benchmark_files import answers, write_json, write_lines

INSTRUCTION = "\nAnswer the question using a single word or phrase."
LABELS = {
    "201": {
        "answer": "yes",
        "isBalanced": True,
        "imageId": "n1",
        "question": "Is it red?",
        "types": {"structural": "verify", "semantic": "attr"},
    },
    "202": {
        "answer": "left",
        "isBalanced": True,
        "imageId": "n1",
        "question": "Which side?",
        "types": {"structural": "query", "semantic": "rel"},
    },
    "203": {
        "answer": "no",
        "isBalanced": True,
        "imageId": "n2",
        "question": "Is it blue?",
        "types": {"structural": "verify", "semantic": "rel"},
    },
    "204": {"answer": "x", "isBalanced": False, "imageId": "n2", "question": "?"},
}


@pytest.fixture
def data(tmp_path):
    write_json(tmp_path / "gqa" / "data" / "testdev_balanced_questions.json", LABELS)
    return tmp_path


def rows(first="Yes.", second="right", third="No"):
    return [
        ("201", "Is it red?" + INSTRUCTION, first),
        ("202", "Which side?" + INSTRUCTION, second),
        ("203", "Is it blue?" + INSTRUCTION, third),
    ]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("yes", True),
        ("Yes", True),
        ("Yes..", True),
        ("yes ", False),
        ("yes, it is", False),
        ("", False),
        (".yes", False),
    ],
)
def test_dots_at_the_end_and_case_are_forgiven_and_nothing_else(text, right):
    assert is_right(text, "yes") is right


def test_score_worked_out_by_hand(data, tmp_path):
    found = score(data, answers(tmp_path, rows()))
    assert found.score.value == pytest.approx(100 * 2 / 3)
    # Images n1 (1 of 2) and n2 (1 of 1): leaving one out gives 100 and 50.
    assert found.score.standard_error == pytest.approx(25)
    assert found.overall.questions == 3
    assert found.right == {"201": True, "202": False, "203": True}
    by = {
        title: {name: (n.questions, n.estimates["score"].value) for name, n in table.items()}
        for title, table in found.categories.items()
    }
    assert by == {
        "structural type": {"query": (1, 0), "verify": (2, 100)},
        "semantic type": {"attr": (1, 100), "rel": (2, 50)},
    }
    assert found.notes == ("3 questions; the published file has 12,578",)


def test_every_balanced_question_needs_an_answer(data, tmp_path):
    with pytest.raises(UserError, match="1 of the 3 questions of gqa have no answer, first '203'"):
        score(data, answers(tmp_path, rows()[:2]))


def test_answers_to_other_questions_are_refused(data, tmp_path):
    with pytest.raises(UserError, match=r"line 1: asked .* question 201 of gqa is 'Is it red\?'"):
        score(data, answers(tmp_path, [("201", "What is it?", "yes"), *rows()[1:]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a JSON object of question id"),
        ({"1": "yes"}, "must be a JSON object of question id"),
        ({"204": LABELS["204"]}, "holds no balanced question"),
        ({"201": {"isBalanced": True}}, "question 201: `answer` must be a text"),
    ],
)
def test_broken_labels_are_one_error(data, tmp_path, value, message):
    write_json(data / "gqa" / "data" / "testdev_balanced_questions.json", value)
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, rows()[:1]))


def test_questions_are_asked_as_published(data):
    (data / "gqa" / "data" / "images").mkdir()
    text = "Is it red?" + INSTRUCTION
    write_lines(
        data / "gqa" / "llava_gqa_testdev_balanced.jsonl",
        [{"question_id": "201", "image": "n1.jpg", "text": text, "category": "default"}],
    )
    (question,) = questions(data)
    assert (question.question_id, question.prompt, question.row_prompt) == ("201", "<image>\n" + text, text)
    assert str(question.pictures[0]) == str(data / "gqa" / "data" / "images" / "n1.jpg")


@pytest.mark.parametrize("image", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a\\..\\b.jpg", ""])
def test_image_outside_the_folder_is_refused(data, image):
    (data / "gqa" / "data" / "images").mkdir()
    write_lines(
        data / "gqa" / "llava_gqa_testdev_balanced.jsonl", [{"question_id": "1", "image": image, "text": "?"}]
    )
    with pytest.raises(UserError, match=r"line 1: image .* must be a path below"):
        questions(data)
