import pytest

from alignkd.errors import UserError
from alignkd.evaluate.tasks.mme import CATEGORIES, COGNITION, PERCEPTION, questions, score, yes_or_no
from tests.evaluate.benchmark_files import answers, write_lines

INSTRUCTION = "\nAnswer the question using a single word or phrase."
IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
SUFFIX = {"artwork": ".jpg"}


def write_image(root, category, image, lines):
    folder = root / category / ("questions_answers_YN" if category in IN_FOLDERS else "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{image}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def data(tmp_path):
    """Two images in each category."""
    root = tmp_path / "MME" / "MME_Benchmark_release_version"
    for category in CATEGORIES:
        for image in ("1", "2"):
            spaces = "  " if (category, image) == ("count", "2") else " "
            write_image(
                root,
                category,
                image,
                [
                    f"Is it {category}?{spaces}Please answer yes or no.\tYes",
                    f"Is it a boat?{spaces}Please answer yes or no.\tNo",
                ],
            )
    return tmp_path


def given(wrong=(), leave_out=()):
    """Right answers but for ``wrong``: (category, image, question 0 or 1)."""
    rows = []
    for category in CATEGORIES:
        for image in ("1", "2"):
            for number, question in enumerate((f"Is it {category}?", "Is it a boat?")):
                if (category, image, number) in leave_out:
                    continue
                is_yes = (number == 0) != ((category, image, number) in wrong)
                rows.append((f"{category}/{image}.png", question + INSTRUCTION, "Yes" if is_yes else "No"))
    return rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("NO", False),
        ("yes, it is", True),
        ("No, it is not", False),
        ("  yes", None),  # only the first four characters count: "  ye"
        (" yes", True),
        ("not sure", False),
        ("It is", None),
        ("", None),
        ("noyes", False),  # "noye" holds no yes
        ("eyes no", True),  # yes goes first
        ("I know", None),
    ],
)
def test_yes_and_no_are_looked_for_at_the_start(text, expected):
    assert yes_or_no(text) is expected


def test_all_right_is_two_thousand_and_eight_hundred(data, tmp_path):
    found = score(data, answers(tmp_path, given()))
    assert found.score.value == 2000
    assert found.score.standard_error == 0
    assert found.overall.estimates["cognition"].value == 800
    assert found.notes == ("56 questions; the published file has 2,374",)


def test_score_worked_out_by_hand(data, tmp_path):
    wrong = [("OCR", "1", 0), ("color", "1", 1), ("color", "2", 1), ("code_reasoning", "2", 0)]
    found = score(data, answers(tmp_path, given(wrong)))
    values = {
        name: tuple(estimate.value for estimate in numbers.estimates.values())
        for name, numbers in found.categories["category"].items()
    }
    assert values["OCR"] == (75 + 50, 75, 50)  # three of four right, one of two images
    assert values["color"] == (50 + 0, 50, 0)
    assert values["code_reasoning"] == (125, 75, 50)
    assert values["count"] == (200, 100, 100)  # two spaces before the instruction are found, too
    assert found.score.value == 2000 - 75 - 150
    assert found.overall.estimates["cognition"].value == 800 - 75
    # OCR's images score 50 + 0 and 100 + 100: the standard error of their mean is 75.
    assert found.categories["category"]["OCR"].estimates["score"].standard_error == pytest.approx(75)
    assert found.score.standard_error == pytest.approx(75)  # color's images are equal
    assert found.right["OCR\t1\tIs it OCR? Please answer yes or no."] is False
    assert sum(found.right.values()) == 52


def test_other_answers_are_wrong_whatever_the_label(data, tmp_path):
    rows = [(question_id, prompt, "maybe") for question_id, prompt, _ in given()]
    found = score(data, answers(tmp_path, rows))
    assert (found.score.value, found.overall.estimates["cognition"].value) == (0, 0)


def test_prompt_may_hold_the_benchmarks_own_instruction(data, tmp_path):
    rows = [
        (question_id, prompt.replace(INSTRUCTION, " Please answer yes or no."), text)
        for question_id, prompt, text in given()
    ]
    assert score(data, answers(tmp_path, rows)).score.value == 2000


def test_both_questions_about_an_image_need_an_answer(data, tmp_path):
    with pytest.raises(
        UserError, match="1 of the 56 questions of mme have no answer, first 'scene' '2' 'Is it a b"
    ):
        score(data, answers(tmp_path, given(leave_out=[("scene", "2", 1)])))


def test_third_answer_about_an_image_is_an_error(data, tmp_path):
    rows = given()
    with pytest.raises(UserError, match=r"line 57: question 'existence' '1' .* is answered again"):
        score(data, answers(tmp_path, [*rows, rows[0]]))


def test_answer_without_prompt_is_an_error(data, tmp_path):
    with pytest.raises(
        UserError, match="line 1: has no `prompt`, which tells an image's two questions apart"
    ):
        score(data, answers(tmp_path, [("OCR/1.png", "", "Yes")]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["One?\tYes"], "must hold two questions about its image, found 1"),
        (["One?\tYes", "Two?\tNo", "Three?\tNo"], "must hold two questions about its image, found 3"),
        (["One?\tYes", "One?\tNo"], r"asks 'One\?' twice"),
        (["One?\tYes", "Two? No"], "line 2: must be a question, a tab and Yes or No"),
        (["One?\tYes", "Two?\tnope"], "line 2: must be a question, a tab and Yes or No"),
    ],
)
def test_broken_labels_are_one_error(data, tmp_path, lines, message):
    write_image(tmp_path / "MME" / "MME_Benchmark_release_version", "OCR", "1", lines)
    with pytest.raises(UserError, match=message):
        score(data, answers(tmp_path, given()))


def question_row(category="OCR"):
    return {
        "question_id": f"{category}/1.png",
        "image": f"{category}/1.png",
        "text": f"Is it {category}?" + INSTRUCTION,
        "category": category,
    }


def test_some_categories_alone_are_scored_with_a_note(tmp_path):
    root = tmp_path / "MME_Benchmark_release_version"
    write_image(
        root, "OCR", "1", ["Is it OCR? Please answer yes or no.\tYes", "Boat? Please answer yes or no.\tNo"]
    )
    write_lines(tmp_path / "llava_mme.jsonl", [question_row()])
    rows = [("OCR/1.png", "Is it OCR?" + INSTRUCTION, "yes"), ("OCR/1.png", "Boat?" + INSTRUCTION, "no")]
    found = score(tmp_path, answers(tmp_path, rows))
    assert found.score.value == 200
    assert found.notes[1].startswith("the sums lack existence, count, ")
    write_lines(tmp_path / "llava_mme.jsonl", [question_row(), question_row("scene")])
    with pytest.raises(UserError, match=r"no labels .* for scene, which .*llava_mme.jsonl asks about"):
        score(tmp_path, answers(tmp_path, rows))


def test_folder_without_labels_is_an_error(tmp_path):
    (tmp_path / "MME" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no CATEGORY/\*.txt with questions"):
        score(tmp_path, answers(tmp_path, given()))


def test_questions_are_asked_as_published(data, tmp_path):
    write_lines(tmp_path / "MME" / "llava_mme.jsonl", [question_row()])
    (question,) = questions(data)
    assert question.question_id == "OCR/1.png"
    assert question.prompt == "<image>\nIs it OCR?" + INSTRUCTION
    assert question.category == "OCR"
    assert str(question.pictures[0]) == str(
        tmp_path / "MME" / "MME_Benchmark_release_version" / "OCR" / "1.png"
    )


def test_ten_categories_are_perception_and_four_cognition():
    assert (len(PERCEPTION), len(COGNITION), len(set(CATEGORIES))) == (10, 4, 14)
