import pytest

from alignkd.evaluate.tasks.layout import Layout, MissingData, Needed, require

LAYOUT = Layout(
    "demo",
    ("Demo", "demo"),
    (
        Needed("questions", ("q.jsonl", "old/q.jsonl"), "the web", for_scoring=False),
        Needed("labels", ("labels.json",), "the paper"),
        Needed("images", ("images",), "the mail", for_scoring=False, is_folder=True),
    ),
)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    return path


@pytest.mark.parametrize(
    "place", ["Demo/labels.json", "demo/labels.json", "labels.json", "Demo/labels.json.gz"]
)
def test_files_are_found_below_the_data_folder_or_in_it(tmp_path, place):
    file = touch(tmp_path / place)
    assert LAYOUT.path(tmp_path, "labels") == file


def test_first_place_goes_before_others(tmp_path):
    other = touch(tmp_path / "Demo" / "old" / "q.jsonl")
    assert LAYOUT.path(tmp_path, "questions") == other
    first = touch(tmp_path / "Demo" / "q.jsonl")
    assert LAYOUT.path(tmp_path, "questions") == first


def test_another_benchmarks_folder_of_images_is_not_taken(tmp_path):
    (tmp_path / "images").mkdir()
    assert LAYOUT.find(tmp_path, "images") is None
    touch(tmp_path / "labels.json")
    assert LAYOUT.find(tmp_path, "images") == tmp_path / "images"
    touch(tmp_path / "Demo" / "labels.json")
    assert LAYOUT.find(tmp_path, "images") is None


def test_folder_of_labels_is_found_without_any_file_beside_it(tmp_path):
    labels = Needed("labels", ("Release", "images"), "the web", is_folder=True)
    layout = Layout("demo", ("Demo", "demo"), (labels,))
    (tmp_path / "images").mkdir()
    assert layout.find(tmp_path, "labels") is None
    (tmp_path / "Release").mkdir()
    assert layout.find(tmp_path, "labels") == tmp_path / "Release"
    (tmp_path / "demo" / "images").mkdir(parents=True)
    assert layout.find(tmp_path, "labels") == tmp_path / "demo" / "images"


def test_folder_is_no_file_and_a_file_no_folder(tmp_path):
    (tmp_path / "Demo" / "labels.json").mkdir(parents=True)
    touch(tmp_path / "Demo" / "images")
    assert [needed.name for needed in LAYOUT.missing(tmp_path, scoring_only=False)] == [
        "questions",
        "labels",
        "images",
    ]


def test_one_error_lists_every_missing_file_its_place_and_its_source(tmp_path):
    other = Layout("other", ("other",), (Needed("labels", ("x.json",), "elsewhere"),))
    with pytest.raises(MissingData) as error:
        require([LAYOUT, other], tmp_path, scoring_only=False)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: 4 files or folders are missing; they must lie like this:",
        f"  {tmp_path}/Demo/q.jsonl",
        "      demo: published in the web (also found as Demo/old/q.jsonl)",
        f"  {tmp_path}/Demo/labels.json",
        "      demo: published in the paper",
        f"  {tmp_path}/Demo/images/",
        "      demo: published in the mail",
        f"  {tmp_path}/other/x.json",
        "      other: published in elsewhere",
    ]


def test_scoring_needs_only_the_labels(tmp_path):
    with pytest.raises(MissingData, match="a file or folder is missing"):
        require([LAYOUT], tmp_path, scoring_only=True)
    touch(tmp_path / "Demo" / "labels.json")
    require([LAYOUT], tmp_path, scoring_only=True)
    with pytest.raises(MissingData, match="2 files or folders"):
        require([LAYOUT], tmp_path, scoring_only=False)
    with pytest.raises(MissingData, match=r"Demo/q.jsonl"):
        LAYOUT.path(tmp_path, "questions")
