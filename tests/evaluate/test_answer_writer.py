import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alignkd.errors import UserError
from alignkd.evaluate.answer_writer import AnswerWriter, merge_answers
from alignkd.evaluate.answers import read_answers
from alignkd.evaluate.tasks.pictures import PictureFile
from alignkd.evaluate.tasks.task import image_question

QUESTIONS = [
    image_question(f"q{number}", f"Question {number}?", PictureFile(Path(), "a.jpg")) for number in range(4)
]
METADATA = {"precision": "fp32"}


def writer(path, model="m", metadata=METADATA, questions=QUESTIONS):
    return AnswerWriter(path, questions, model, metadata)


def test_rows_are_in_llavas_format(tmp_path):
    with writer(tmp_path / "new" / "a.jsonl") as file:
        file.write({0: "Yes", 2: "N\u00f8\n"})
    rows = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "question_id": "q2",
        "prompt": "Question 2?",
        "text": "N\u00f8\n",
        "answer_id": "2",
        "model_id": "m",
        "metadata": {"precision": "fp32"},
    }
    assert [answer.text for answer in read_answers(tmp_path / "new" / "a.jsonl").answers] == [
        "Yes",
        "N\u00f8\n",
    ]


def test_resumed_file_equals_the_one_written_in_one_go(tmp_path):
    with writer(tmp_path / "whole.jsonl") as file:
        for number in range(4):
            file.write({number: f"answer {number}"})
    whole = (tmp_path / "whole.jsonl").read_bytes()
    torn = tmp_path / "torn.jsonl"
    for size in range(len(whole)):  # killed after any byte
        torn.write_bytes(whole[:size])
        with writer(torn) as file:
            assert file.done == set(range(whole[:size].count(b"\n")))
            for number in range(4):
                if number not in file.done:
                    file.write({number: f"answer {number}"})
            assert file.done == {0, 1, 2, 3}
        assert torn.read_bytes() == whole


def test_long_torn_line_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    with writer(path) as file:
        file.write({0: "kept"})
    kept = path.read_bytes()
    path.write_bytes(kept + b"x" * 200_000)
    writer(path).__exit__(None, None, None)
    assert path.read_bytes() == kept


def test_answers_are_in_the_file_although_the_process_is_killed(tmp_path):
    program = f"""
import time
from pathlib import Path
from tests.evaluate.test_answer_writer import writer
file = writer(Path({str(tmp_path / "a.jsonl")!r}))
file.write({{0: "first", 1: "second"}})
print("written", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    with writer(tmp_path / "a.jsonl") as file:
        assert file.done == {0, 1}


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"model": "n"}, "model_id"),
        ({"metadata": {"precision": "bf16"}}, "metadata"),
        ({"questions": QUESTIONS[1:]}, "question_id"),
    ],
)
def test_file_of_another_evaluation_is_not_continued(tmp_path, other, key):
    with writer(tmp_path / "a.jsonl") as file:
        file.write({0: "Yes"})
    with pytest.raises(UserError, match=f"line 1: `{key}` is .* move the file away"):
        writer(tmp_path / "a.jsonl", **other)


@pytest.mark.parametrize("answer_id", ["4", "x", "-1", 0, None])
def test_foreign_answer_ids_are_refused(tmp_path, answer_id):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"question_id": "q0", "text": "", "answer_id": answer_id}) + "\n"
    )
    with pytest.raises(UserError, match="`answer_id` must be the number of a question, 0 to 3"):
        writer(tmp_path / "a.jsonl")


def test_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        writer(tmp_path / "file" / "a.jsonl")


def test_parts_of_all_ranks_are_merged_in_question_order(tmp_path):
    parts = [tmp_path / name for name in ("0.jsonl", "1.jsonl", "2.jsonl", "never.jsonl")]
    for part, numbers in zip(parts, ((3, 1), (0, 2), ()), strict=False):
        with writer(part) as file:
            for number in numbers:
                file.write({number: str(number)})
    merge_answers(parts, 4, tmp_path / "out.jsonl")
    with writer(tmp_path / "one.jsonl") as file:
        file.write({number: str(number) for number in range(4)})
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_merge_refuses_missing_and_repeated_answers(tmp_path):
    with writer(tmp_path / "0.jsonl") as file:
        file.write({0: "a", 2: "c"})
    with pytest.raises(UserError, match="2 of 4 answers are missing, first 1"):
        merge_answers([tmp_path / "0.jsonl"], 4, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="line 1: answer 0 is in another part already"):
        merge_answers([tmp_path / "0.jsonl"] * 2, 4, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
