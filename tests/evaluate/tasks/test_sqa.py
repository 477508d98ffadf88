import pytest

from alignkd.errors import UserError
from alignkd.evaluate.tasks.sqa import TASK, questions, score
from tests.evaluate.benchmark_files import answers, write_json

INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


def entry(question_id, label, image=True):
    marker = "<image>\n" if image else ""
    more = {"image": f"{question_id}/image.png"} if image else {}
    turns = [
        {"from": "human", "value": f"{marker}Which {question_id}?\nA. x\nB. y"},
        {"from": "gpt", "value": label},
    ]
    return {"id": question_id, "conversations": turns} | more


@pytest.fixture
def data(tmp_path):
    entries = [entry("4", "A"), entry("5", "B"), entry("6", "B"), entry("7", "A", image=False)]
    write_json(tmp_path / "scienceqa" / "llava_test_CQM-A.json", entries)
    return tmp_path


def rows(**texts):
    return [
        (key[1:], f"<image>\nWhich {key[1:]}?\nA. x\nB. y" + INSTRUCTION, text) for key, text in texts.items()
    ]


def test_score_is_over_questions_with_an_image(data, tmp_path):
    found = score(data, answers(tmp_path, rows(q4="A", q5="B. y", q6="C", q7="A")))
    assert found.score.value == pytest.approx(100 * 2 / 3)
    assert found.score.standard_error == pytest.approx(100 / 3)  # sqrt(2/9 x 3/2 / 3)
    assert found.overall.questions == 3
    assert found.overall.estimates["accuracy_all"].value == pytest.approx(75)
    table = {
        name: (n.questions, n.estimates["score"].value) for name, n in found.categories["context"].items()
    }
    assert table == {"image": (3, pytest.approx(100 * 2 / 3)), "text only": (1, 100)}
    assert found.right == {"4": True, "5": True, "6": False}


def test_missing_answers_are_wrong_as_in_the_official_script_and_a_note_says_so(data, tmp_path):
    found = score(data, answers(tmp_path, rows(q5="B", q7="A")))
    assert found.score.value == pytest.approx(100 / 3)
    assert found.notes[1] == "2 questions with an image have no answer and count as wrong"


def test_text_only_questions_need_no_answer(data, tmp_path):
    found = score(data, answers(tmp_path, rows(q4="A", q5="B", q6="B")))
    assert found.score.value == 100
    assert "accuracy_all" not in found.overall.estimates
    assert found.notes == ("3 questions with an image; the published file has 2,017",)


def test_no_answer_to_any_image_is_an_error(data, tmp_path):
    with pytest.raises(UserError, match="no question of sqa with an image has an answer"):
        score(data, answers(tmp_path, rows(q7="A")))


def test_report_names_the_padding(data, tmp_path):
    unknown = score(data, answers(tmp_path, rows(q4="A")))
    assert unknown.settings["image_padding"].startswith("not recorded")
    known = score(data, answers(tmp_path, rows(q4="A"), metadata={"image_padding": "square"}))
    assert known.settings == {"image_padding": "square"}
    assert TASK.pad_images is False  # as MobileVLM


def test_label_may_be_a_sentence(data, tmp_path):
    write_json(data / "scienceqa" / "llava_test_CQM-A.json", [entry("4", "The answer is A.")])
    assert score(data, answers(tmp_path, rows(q4="A"))).score.value == 100


def test_prompts_mark_the_image_as_the_official_script_needs_it(data):
    (data / "scienceqa" / "images" / "test").mkdir(parents=True)
    found = questions(data)
    assert found[0].prompt == found[0].row_prompt == "<image>\nWhich 4?\nA. x\nB. y" + INSTRUCTION
    assert str(found[0].pictures[0]) == str(data / "scienceqa" / "images" / "test" / "4" / "image.png")
    assert (found[3].prompt, found[3].pictures) == ("Which 7?\nA. x\nB. y" + INSTRUCTION, ())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must be a JSON list"),
        ([], "must be a JSON list"),
        ([3], "entry 0: must be an object"),
        ([{"id": "1", "conversations": []}], "entry 0: `conversations` must be a question and its answer"),
        ([{"id": "1", "conversations": [{"value": "q"}, {}]}], "entry 0: turn 1: `value` must be a text"),
        ([entry("4", "dog")], "entry 0: the answer must be an option letter, found 'dog'"),
        ([entry("4", "A", image=False)], "no question has an image"),
    ],
)
def test_broken_questions_are_one_error(data, tmp_path, value, message):
    write_json(data / "scienceqa" / "llava_test_CQM-A.json", value)
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, rows(q4="A")))
