import pytest

from alignkd.errors import UserError
from alignkd.evaluate.tasks.registry import BENCHMARKS, tasks_named


def names(text):
    return [task.name for task in tasks_named(text)]


def test_tasks_come_once_in_the_order_of_the_papers_table():
    assert names("pope, GQA,pope,") == ["gqa", "pope"]
    assert names("all") == names("mme,all") == ["gqa", "sqa", "textvqa", "pope", "mme", "mmbench"]


def test_unknown_and_missing_names_list_the_valid_ones():
    valid = "valid: gqa, sqa, textvqa, pope, mme, mmbench, sample, all, or own alone"
    with pytest.raises(UserError, match=f"task 'popes' is unknown; {valid}; did you mean pope"):
        tasks_named("gqa,popes")
    with pytest.raises(UserError, match=f"no task is named; {valid}"):
        tasks_named(" ,")


def test_official_lengths_padding_and_scale():
    assert {name: task.max_new_tokens for name, task in BENCHMARKS.items()} == {
        "gqa": 128,
        "sqa": 1024,
        "textvqa": 128,
        "pope": 128,
        "mme": 128,
        "mmbench": 1024,
    }
    assert [name for name, task in BENCHMARKS.items() if not task.pad_images] == ["sqa"]
    assert {name: task.average_scale for name, task in BENCHMARKS.items() if task.average_scale != 1} == {
        "mme": 1 / 20
    }
