import pytest

from alignkd.data.records import Turn
from alignkd.errors import UserError
from alignkd.evaluate.tasks.own import own_task
from tests.evaluate.benchmark_files import answers, write_json


def record(question_id, answer, image="a.jpg", question="<image>\nWhat?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": question_id, "image": image, "conversations": turns} | more


def score_of(tmp_path, metric, records, texts):
    task = own_task(tmp_path, write_json(tmp_path / "own.json", records).name, None, metric)
    rows = [(record["id"], "", text) for record, text in zip(records, texts, strict=True)]
    return task.score(tmp_path, answers(tmp_path, rows))


@pytest.mark.parametrize(
    ("metric", "labels", "texts", "expected"),
    [
        ("exact", ["red ", "Red", "3"], [" red", "red", "3."], [1, 0, 0]),
        ("vqa", ["The dog", "2", "cat"], ["dog.", "two", "cats"], [1, 1, 0]),
        ("letter", ["A", "B", "C"], ["A", "B. that", "The answer is D."], [1, 1, 0]),
        ("yes-no", ["yes", "No", "no"], ["Yes, it is", "no", "maybe"], [1, 1, 0]),
    ],
)
def test_metrics_worked_out_by_hand(tmp_path, metric, labels, texts, expected):
    records = [record(str(number), label) for number, label in enumerate(labels)]
    found = score_of(tmp_path, metric, records, texts)
    assert found.score.value == pytest.approx(100 * sum(expected) / 3)
    assert found.settings["metric"] == metric
    if metric == "vqa":
        assert found.right is None
    else:
        assert found.right == {str(number): bool(right) for number, right in enumerate(expected)}


def test_ten_peoples_answers_count_for_vqa(tmp_path):
    records = [record("1", "dog", answers=["dog"] * 2 + ["cat"] * 8)]
    assert score_of(tmp_path, "vqa", records, ["dog"]).score.value == pytest.approx(60)


def test_kinds_have_their_rows_and_images_are_the_units(tmp_path):
    records = [record("1", "a", kind="x"), record("2", "b", kind="y"), record("3", "c", image="b.jpg")]
    found = score_of(tmp_path, "exact", records, ["a", "b", "-"])
    assert {name: numbers.estimates["score"].value for name, numbers in found.categories["kind"].items()} == {
        "x": 100,
        "y": 100,
        "question": 0,
    }
    assert found.units.names == ("a.jpg", "b.jpg")


def test_questions_keep_earlier_turns_and_several_pictures(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nHello"},
        {"from": "gpt", "value": "Hi"},
        {"from": "human", "value": "<image> Same?"},
        {"from": "gpt", "value": "yes"},
    ]
    file = write_json(
        tmp_path / "own.json", [{"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": turns}]
    )
    (question,) = own_task(tmp_path, file.name, tmp_path / "pictures", "exact").questions(tmp_path)
    assert question.earlier == (Turn("human", "<image>\nHello"), Turn("gpt", "Hi"))
    assert (question.prompt, question.row_prompt) == ("<image> Same?", "Same?")
    assert [str(picture) for picture in question.pictures] == [
        str(tmp_path / "pictures" / "a.jpg"),
        str(tmp_path / "pictures" / "b.jpg"),
    ]


@pytest.mark.parametrize(
    ("metric", "records", "message"),
    [
        ("exact", {}, "must be a JSON list with at least one record"),
        ("exact", [], "must be a JSON list with at least one record"),
        ("exact", [3], "entry 0: not an object"),
        ("exact", [record("1", "a"), record("1", "b")], "entry 1: id '1' is there twice"),
        ("exact", [record("1", "a", kind=3)], "entry 0: `kind` must be a text"),
        (
            "letter",
            [record("1", "dog")],
            "entry 0: for the metric letter the answer must be an option letter",
        ),
        ("yes-no", [record("1", "maybe")], "entry 0: for the metric yes-no the answer must be yes or no"),
        ("vqa", [record("1", "a", answers=["a"])], "entry 0: `answers` must be 10 texts"),
    ],
)
def test_broken_files_are_one_error(tmp_path, metric, records, message):
    file = write_json(tmp_path / "own.json", records)
    with pytest.raises(UserError, match=message):
        own_task(tmp_path, file.name, None, metric).questions(tmp_path)


def test_unknown_metric_lists_the_valid_ones(tmp_path):
    with pytest.raises(
        UserError, match="'yesno' is unknown; valid: exact, vqa, letter, yes-no; did you mean yes-no"
    ):
        own_task(tmp_path, "own.json", None, "yesno")


def test_every_record_needs_an_answer(tmp_path):
    task = own_task(
        tmp_path, write_json(tmp_path / "own.json", [record("1", "a"), record("2", "b")]).name, None, "exact"
    )
    with pytest.raises(UserError, match="1 of the 2 questions of own have no answer, first '2'"):
        task.score(tmp_path, answers(tmp_path, [("1", "", "a")]))
