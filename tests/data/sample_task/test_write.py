import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from alignkd.data.records import parse_sample
from alignkd.data.sample_task import write_sample_data
from alignkd.data.sample_task.digits import IMAGE_SIDE
from alignkd.data.sample_task.questions import KINDS
from alignkd.data.templates import template_problem
from alignkd.errors import UserError

TEMPLATES = {"train_captions.json": "plain", "train_questions.json": "v1", "test.json": "v1"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "data"
    write_sample_data(out, samples=600, seed=0)
    return out


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_sample_data(tmp_path / name, samples=40, seed=seed)
    first, again, other = (files_of(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert first[Path("test.json")] != other[Path("test.json")]
    assert first[Path("images/train_000000.png")] != other[Path("images/train_000000.png")]


def test_half_of_the_samples_are_captions_and_half_questions(written):
    assert len(read(written, "train_captions.json")) == 300
    assert len(read(written, "train_questions.json")) == 300
    assert len(read(written, "test.json")) == 64


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_every_record_is_a_valid_sample(written, name, template):
    for number, record in enumerate(read(written, name)):
        sample = parse_sample(record, name, 0, number)
        assert template_problem(sample.turns, template) is None
        for image in sample.images:
            with Image.open(written / "images" / image) as picture:
                assert picture.size == (IMAGE_SIDE, IMAGE_SIDE)


def test_splits_share_no_image_file(written):
    def images(name):
        values = [record.get("image", []) for record in read(written, name)]
        return {path for value in values for path in (value if isinstance(value, list) else [value])}

    train = images("train_captions.json") | images("train_questions.json")
    assert train
    assert not train & images("test.json")


def test_ids_are_unique(written):
    ids = [record["id"] for name in TEMPLATES for record in read(written, name)]
    assert len(ids) == len(set(ids))


def test_training_questions_mix_all_numbers_of_images(written):
    images = [record.get("image") for record in read(written, "train_questions.json")]
    assert any(image is None for image in images)
    assert any(isinstance(image, list) and len(image) == 2 for image in images)
    assert sum(isinstance(image, str) for image in images) > 200


def test_test_records_name_their_kind(written):
    assert {record["kind"] for record in read(written, "test.json")} <= set(KINDS)


def test_progress_ends_at_its_total(tmp_path):
    calls = []
    write_sample_data(tmp_path / "data", 20, 0, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total in calls} == {len(calls)}


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        write_sample_data(tmp_path, 20, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_interrupted_writing_leaves_no_folder_and_can_be_repeated(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample_data(tmp_path / "data", 20, 0, progress=stop)
    assert not (tmp_path / "data").exists()
    write_sample_data(tmp_path / "data", 20, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(("samples", "seed", "named"), [(0, 0, "--samples 0"), (20, -1, "--seed -1")])
def test_bad_numbers_are_refused(tmp_path, samples, seed, named):
    with pytest.raises(UserError, match=named):
        write_sample_data(tmp_path / "data", samples, seed)


def test_missing_scikit_learn_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'alignkd\[sample\]'"):
        write_sample_data(tmp_path / "data", 20, 0)
    assert not any(tmp_path.iterdir())
