import shutil
import subprocess
import sys

import pytest

from alignkd.errors import UserError
from alignkd.evaluate.scoring import check_data, score_file
from alignkd.evaluate.tasks.layout import MissingData
from alignkd.evaluate.tasks.registry import BENCHMARKS, tasks_named
from tests.evaluate.benchmark_files import answers, write_json, write_lines

TEXT = "Is it red?\nAnswer the question using a single word or phrase."


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "gqa"
    write_json(folder / "data" / "testdev_balanced_questions.json", {"1": {"answer": "yes", "imageId": "n1"}})
    write_lines(
        folder / "llava_gqa_testdev_balanced.jsonl",
        [
            {"question_id": "1", "image": "n1.jpg", "text": TEXT},
            {"question_id": "2", "image": "n1.jpg", "text": TEXT},
            {"question_id": "3", "image": "n2.jpg", "text": TEXT},
        ],
    )
    (folder / "data" / "images").mkdir()
    (folder / "data" / "images" / "n1.jpg").write_text("")
    return tmp_path


def test_file_is_scored_from_the_data_folder_or_the_tasks_own(data, tmp_path):
    file = answers(tmp_path, [("1", TEXT, "Yes")]).path
    for folder in (data, data / "gqa"):
        assert score_file(BENCHMARKS["gqa"], file, folder).score.value == 100


def test_scoring_needs_neither_questions_nor_pictures(data, tmp_path):
    (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    shutil.rmtree(data / "gqa" / "data" / "images")
    assert score_file(BENCHMARKS["gqa"], answers(tmp_path, [("1", TEXT, "No")]).path, data).score.value == 0


def test_missing_labels_are_named_before_the_answers_are_read(tmp_path):
    with pytest.raises(MissingData, match=r"gqa/data/testdev_balanced_questions.json"):
        score_file(BENCHMARKS["gqa"], tmp_path / "none.jsonl", tmp_path)


def test_check_counts_questions_and_names_missing_pictures(data):
    with pytest.raises(UserError, match=r"gqa: 1 pictures are missing, such as .*n2.jpg"):
        check_data(tasks_named("gqa"), data)
    (data / "gqa" / "data" / "images" / "n2.jpg").write_text("")
    assert check_data(tasks_named("gqa"), data) == {"gqa": 3}


def test_check_lists_the_missing_files_of_all_tasks_at_once(tmp_path):
    with pytest.raises(MissingData) as error:
        check_data(tasks_named("all"), tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{tmp_path}: 16 files or folders are missing")
    assert f"  {tmp_path}/pope/coco/coco_pope_random.json" in lines
    assert f"  {tmp_path}/MME/MME_Benchmark_release_version/" in lines
    assert f"  {tmp_path}/mmbench/mmbench_dev_20230712.tsv" in lines
    assert sum("://" in line for line in lines) == 16


def test_scoring_imports_no_torch():
    program = """
import sys
import alignkd.evaluate.answer_writer, alignkd.evaluate.score_report, alignkd.evaluate.scoring
import alignkd.evaluate.tasks.own
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
