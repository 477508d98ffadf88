import base64
import csv
import io

import openpyxl
import pytest
from PIL import Image

from alignkd.errors import UserError
from alignkd.evaluate.tasks.mmbench import questions, score, write_upload_file
from alignkd.evaluate.tasks.pictures import open_picture
from tests.evaluate.benchmark_files import answers

INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "l2-category",
    "source",
    "split",
    "image",
]
MILLION = 1_000_000


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


RED = picture("red")


def row(index, options, answer, question="Which?", hint="", category="ocr", group="fine", image=RED):
    cells = [*options, *[""] * (4 - len(options))]
    return [str(index), question, hint, *cells, answer, category, group, "web", "dev", image]


ROWS = [
    row(1, ["x", "y"], "A", hint="Look\nclosely."),
    row(1 + MILLION, ["y", "x"], "B", hint="Look\nclosely."),
    row(2, ["1", "2", "NA", "None"], "D", question='How "many"?', category="count", group="coarse"),
    row(3, ["p", "q", "r"], "C", category="ocr", group="coarse"),
    row(3 + MILLION, ["q", "r", "p"], "B", category="ocr", group="coarse"),
    row(3 + 2 * MILLION, ["r", "p", "q"], "A", category="ocr", group="coarse", image="3"),
]


def write_table(folder, rows, columns=COLUMNS, name="mmbench_dev_20230712.tsv"):
    (folder / "mmbench").mkdir(exist_ok=True)
    with (folder / "mmbench" / name).open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return folder


@pytest.fixture
def data(tmp_path):
    return write_table(tmp_path, ROWS)


def given(*texts):
    return [(int(cells[0]), f"{cells[1]}\nA. ...", text) for cells, text in zip(ROWS, texts, strict=True)]


def test_question_is_right_when_all_its_rotations_are(data, tmp_path):
    found = score(data, answers(tmp_path, given("A", "B", "D", "C", "A", "A")))
    assert found.score.value == pytest.approx(200 / 3)  # question 3 has one wrong rotation
    assert found.score.standard_error == pytest.approx(100 / 3)
    assert found.overall.questions == 3
    assert found.overall.estimates["accuracy_of_rows"].value == pytest.approx(500 / 6)
    assert found.right == {"1": True, "2": True, "3": False}
    tables = {
        title: {name: (numbers.questions, numbers.estimates["score"].value) for name, numbers in rows.items()}
        for title, rows in found.categories.items()
    }
    assert tables == {
        "l2-category": {"coarse": (2, 50), "fine": (1, 100)},
        "category": {"count": (1, 100), "ocr": (2, 50)},
    }
    assert found.notes == ("6 rows; the published file has 4,377",)


def test_letters_in_sentences_and_texts_of_options_count(data, tmp_path):
    texts = ("The answer is A", "(B)", "it is none", "it is the r", "B.", "A) r")
    assert score(data, answers(tmp_path, given(*texts))).score.value == 100


def test_prompt_shows_hint_question_and_options_up_to_an_empty_one(data):
    found = questions(data)
    assert found[0].prompt == "<image>\nLook\nclosely.\nWhich?\nA. x\nB. y" + INSTRUCTION
    # "NA" is a text; "None" ends the options, in the official prompt too.
    assert found[2].row_prompt == 'How "many"?\nA. 1\nB. 2\nC. NA' + INSTRUCTION
    assert [question.question_id for question in found[3:]] == [3, 3 + MILLION, 3 + 2 * MILLION]


@pytest.mark.parametrize("nothing", ["", "nan", "NaN", "none", "None", " "])
def test_empty_hints_and_options_are_left_out(tmp_path, nothing):
    write_table(tmp_path, [row(1, ["x", "y", nothing, "z"], "A", hint=nothing)])
    assert questions(tmp_path)[0].row_prompt == "Which?\nA. x\nB. y" + INSTRUCTION


def test_pictures_are_decoded_also_where_a_row_refers_to_another(data):
    image = open_picture(questions(data)[5].pictures[0], max_pixels=6)
    assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))


def test_without_rotations_a_note_says_that_it_is_plain_accuracy(tmp_path):
    write_table(tmp_path, [ROWS[0], ROWS[2]])
    file = answers(tmp_path, [given(*"ABDCBA")[0], given(*"ABDCBA")[2]])
    assert score(tmp_path, file).notes[1].startswith("the file has no rotations")


@pytest.mark.parametrize("name", ["mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"])
def test_other_public_names_of_the_file_are_found(tmp_path, name):
    write_table(tmp_path, ROWS, name=name)
    assert len(questions(tmp_path)) == 6


def test_upload_file_has_the_same_rows_with_predictions(data, tmp_path):
    file = answers(tmp_path, given("A", "B", "D", "C", "x\ty", "A"))
    write_upload_file(data, file, tmp_path / "upload.tsv")
    with (tmp_path / "upload.tsv").open(newline="") as upload:
        rows = list(csv.DictReader(upload, delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [row["prediction"] for row in rows] == ["A", "B", "D", "C", "x\ty", "A"]
    assert (rows[2]["index"], rows[2]["C"], rows[2]["D"]) == ("2", "NA", "None")


def test_upload_file_for_excel_holds_the_same(data, tmp_path):
    write_upload_file(data, answers(tmp_path, given(*"ABDCBA")), tmp_path / "upload.xlsx")
    rows = list(openpyxl.load_workbook(tmp_path / "upload.xlsx").active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[3] == (2, 'How "many"?', "1", "2", "NA", "None", "D", "D", "dev")


def test_upload_file_of_another_kind_is_refused(data, tmp_path):
    file = answers(tmp_path, given(*"ABDCBA"))
    with pytest.raises(UserError, match=r"must end in .xlsx"):
        write_upload_file(data, file, tmp_path / "upload.csv")
    with pytest.raises(UserError, match="cannot be written"):
        write_upload_file(data, file, tmp_path / "none" / "upload.tsv")


def test_split_without_answers_cannot_be_scored_but_uploaded(tmp_path):
    columns = [column for column in COLUMNS if column != "answer"]
    write_table(tmp_path, [[*cells[:7], *cells[8:]] for cells in ROWS], columns)
    file = answers(tmp_path, given(*"ABDCBA"))
    with pytest.raises(
        UserError, match="line 3: `answer` must be the letter of an option, found ''; the test split"
    ):
        score(tmp_path, file)
    write_upload_file(tmp_path, file, tmp_path / "upload.tsv")
    assert (tmp_path / "upload.tsv").read_text().count("\n") == 7


def test_every_rotation_needs_an_answer(data, tmp_path):
    with pytest.raises(UserError, match="1 of the 6 questions of mmbench have no answer, first '2000003'"):
        score(data, answers(tmp_path, given(*"ABDCBA")[:5]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        ([ROWS[0], ROWS[0]], "index 1 is there twice"),
        ([["x", *ROWS[2][1:]]], "line 2: `index` must be a whole number, found 'x'"),
        ([ROWS[2][:-1]], "line 2: has another number of cells than the header"),
        ([[*ROWS[2], "more"]], "line 2: has another number of cells than the header"),
        ([row(1, ["x", "y"], "C")], "line 2: `answer` must be the letter of an option, found 'C'"),
    ],
)
def test_broken_tables_are_one_error(tmp_path, rows, message):
    write_table(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        score(tmp_path, answers(tmp_path, [(1, "", "A")]))


def test_table_of_something_else_is_an_error(tmp_path):
    write_table(tmp_path, [["1", "?"]], ["index", "question"])
    with pytest.raises(UserError, match="has no column A, B, C, D, image; it must be MMBench's TSV"):
        questions(tmp_path)


@pytest.mark.parametrize(("image", "message"), [("", "has no image"), ("77", "`image` refers to index 77")])
def test_row_without_a_picture_is_an_error(tmp_path, image, message):
    write_table(tmp_path, [row(1, ["x"], "A", image=image)])
    with pytest.raises(UserError, match=message):
        questions(tmp_path)
