import pytest

from alignkd.errors import UserError
from alignkd.evaluate.answers import check_prompts, match, match_all, read_answers
from tests.evaluate.benchmark_files import answers, write_lines

KEYS = [("1",), ("2",), ("3",)]


def test_answers_follow_the_questions_whatever_their_order_and_type_of_id(tmp_path):
    file = answers(tmp_path, [("3", "", "c"), (1, "", "a"), (2, "", "b")])
    assert [answer.text for answer in match_all(file, KEYS, "pope")] == ["a", "b", "c"]


def test_models_and_settings_are_those_of_the_rows(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            {
                "question_id": 1,
                "text": "",
                "model_id": "m",
                "metadata": {"precision": "bf16", "batch_size": 1},
            },
            {
                "question_id": 2,
                "text": "",
                "model_id": "n",
                "metadata": {"precision": "fp32", "batch_size": 1},
            },
            {"question_id": 3, "text": ""},
        ],
    )
    file = read_answers(path)
    assert file.models == ("m", "n")
    assert file.settings() == {"precision": "bf16 and fp32", "batch_size": "1"}


@pytest.mark.parametrize("row", [{"text": "a"}, {"question_id": 1}, {"question_id": 1, "text": None}])
def test_row_without_id_or_text_says_what_an_answer_is(tmp_path, row):
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 7, "text": "x"}, row])
    with pytest.raises(UserError, match=r'line 2: .*; an answer is \{"question_id": '):
        read_answers(path)


def test_repeated_answer_names_both_lines(tmp_path):
    file = answers(tmp_path, [(1, "", "a"), (2, "", "b"), (1, "", "a")])
    with pytest.raises(UserError, match=r"line 3: question '1' is answered again \(first in line 1\)"):
        match(file, KEYS, "pope")


def test_unknown_question_names_its_line(tmp_path):
    file = answers(tmp_path, [(1, "", "a"), (9, "", "b")])
    with pytest.raises(UserError, match=r"line 2: pope has no question '9'; 1 of 2 answers"):
        match(file, KEYS, "pope")


def test_file_of_another_benchmark_is_told_by_its_ids(tmp_path):
    file = answers(tmp_path, [("artwork/1.jpg", "", "a"), ("artwork/2.jpg", "", "b")])
    with pytest.raises(
        UserError, match=r"none of its 2 answers .* begins with 'artwork/1.jpg', pope with '1'"
    ):
        match(file, KEYS, "pope")


def test_too_few_answers_is_one_error(tmp_path):
    file = answers(tmp_path, [(2, "", "b")])
    with pytest.raises(UserError, match="2 of the 3 questions of pope have no answer, first '1'"):
        match_all(file, KEYS, "pope")
    assert [answer and answer.text for answer in match(file, KEYS, "pope")] == [None, "b", None]


def test_question_that_occurs_twice_takes_two_answers_in_order(tmp_path):
    file = answers(tmp_path, [(1, "", "a"), (1, "", "b")])
    assert [answer.text for answer in match_all(file, [("1",), ("1",)], "textvqa")] == ["a", "b"]


def test_prompt_must_hold_the_question_white_space_aside(tmp_path):
    file = answers(tmp_path, [(1, "<image>\nIs it  red?\nOne word.", "a"), (2, "", "b")])
    first, second = file.answers
    check_prompts(file, [(first, "Is it red?"), (second, "no prompt, no check")], "pope")
    with pytest.raises(
        UserError, match=r"line 1: asked .* is 'Is it blue\?': the answers are to another release"
    ):
        check_prompts(file, [(first, "Is it blue?")], "pope")
