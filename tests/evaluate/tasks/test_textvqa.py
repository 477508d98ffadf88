import pytest

from alignkd.errors import UserError
from alignkd.evaluate.tasks.textvqa import questions, score
from tests.evaluate.benchmark_files import answers, write_json, write_lines

INSTRUCTION = "Answer the question using a single word or phrase."


def prompt(question, tokens="stop, go"):
    return f"{question}\nReference OCR token: {tokens}\n{INSTRUCTION}"


@pytest.fixture
def data(tmp_path):
    write_json(
        tmp_path / "textvqa" / "TextVQA_0.5.1_val.json",
        {
            "data": [
                {"image_id": "i1", "question": "What is WRITTEN?", "answers": ["stop"] * 3 + ["go"] * 7},
                {"image_id": "i1", "question": "What colour?", "answers": ["red"] * 10},
                {"image_id": "i2", "question": "What is written?", "answers": ["Nokia"] * 2 + ["x"] * 8},
            ]
        },
    )
    return tmp_path


def test_score_worked_out_by_hand(data, tmp_path):
    file = answers(
        tmp_path,
        [
            ("i2", prompt("What is written?", ""), "The nokia."),  # two of ten: 0.6
            ("i1", prompt("What is written?"), "Stop"),  # three of ten: 0.9
            ("i1", prompt("What colour?"), "blue"),
        ],
    )
    found = score(data, file)
    assert found.score.value == pytest.approx(100 * 1.5 / 3)
    # Images i1 (0.9 of 2) and i2 (0.6 of 1): leaving one out gives 60 and 45.
    assert found.score.standard_error == pytest.approx(7.5)
    assert found.right is None
    assert found.notes == ("3 questions; the published file has 5,000",)


def test_tokens_may_stand_first_or_be_missing_which_a_note_says(data, tmp_path):
    file = answers(
        tmp_path,
        [
            ("i1", f"Reference OCR token: a\nWhat is written?\n{INSTRUCTION}", "go"),
            ("i1", f"What colour?\n{INSTRUCTION}", "red"),
            ("i2", prompt("What is written?"), "x"),
        ],
    )
    found = score(data, file)
    assert found.score.value == 100
    assert found.notes[1] == "1 questions were asked without OCR tokens: lower by 5 to 13 points"


@pytest.mark.parametrize("text", ["", "What colour?", "a\nb\nc", f"{prompt('What colour?')}\nmore"])
def test_prompt_without_a_question_is_an_error(data, tmp_path, text):
    with pytest.raises(
        UserError, match="line 1: `prompt` must be a question, the line `Reference OCR token: "
    ):
        score(data, answers(tmp_path, [("i1", text, "red")]))


def test_too_few_answers_are_an_error(data, tmp_path):
    with pytest.raises(
        UserError, match="2 of the 3 questions of textvqa have no answer, first 'i1' 'what is wr"
    ):
        score(data, answers(tmp_path, [("i1", prompt("What colour?"), "red")]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], 'must be {"data": '),
        ({"data": []}, 'must be {"data": '),
        ({"data": [3]}, "entry 0: must be an object"),
        (
            {"data": [{"image_id": "i", "question": "q"}]},
            "entry 0: `answers` must be 10 texts; the test split",
        ),
        (
            {"data": [{"image_id": "i", "question": "q", "answers": ["a"] * 9}]},
            "entry 0: `answers` must be 10",
        ),
        (
            {"data": [{"image_id": "i", "question": "q", "answers": [1] * 10}]},
            "entry 0: `answers` must be 10",
        ),
        ({"data": [{"question": "q", "answers": ["a"] * 10}]}, "entry 0: `image_id` must be"),
    ],
)
def test_broken_labels_are_one_error(data, tmp_path, value, message):
    write_json(data / "textvqa" / "TextVQA_0.5.1_val.json", value)
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, [("i1", prompt("What colour?"), "red")]))


def test_questions_are_asked_with_their_ocr_tokens(data):
    (data / "textvqa" / "train_images").mkdir()
    row = {"question_id": "i1", "image": "i1.jpg", "text": prompt("What colour?", ""), "category": "default"}
    file = write_lines(data / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", [row])
    (question,) = questions(data)
    assert question.prompt == f"<image>\nWhat colour?\nReference OCR token: \n{INSTRUCTION}"
    assert question.row_prompt == row["text"]
    assert str(question.pictures[0]) == str(data / "textvqa" / "train_images" / "i1.jpg")
    write_lines(file, [row | {"text": f"What colour?\n{INSTRUCTION}"}])
    with pytest.raises(UserError, match=r"line 1: `text` has no line `Reference OCR token: ...`"):
        questions(data)
