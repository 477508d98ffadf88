import pytest

from alignkd.evaluate.accuracy import KindAccuracy, score


def test_scores_equal_those_worked_out_by_hand():
    accuracy = score(
        ["position", "position", "position", "position", "row"],
        ["3", "3", "5", "7", "top"],
        ["3", "4", "5", "3", "bottom"],
    )
    assert accuracy.kinds == {
        "position": KindAccuracy(accuracy=0.5, baseline=0.5, count=4),
        "row": KindAccuracy(accuracy=0.0, baseline=1.0, count=1),
    }
    assert accuracy.overall == KindAccuracy(accuracy=0.4, baseline=0.6, count=5)


def test_most_frequent_kind_comes_first():
    accuracy = score(["a", "b", "b"], ["1"] * 3, ["1"] * 3)
    assert list(accuracy.kinds) == ["b", "a"]


def test_only_surrounding_white_space_is_ignored():
    accuracy = score(["k"] * 3, ["3", "3", "top left"], [" 3\n", "3.", "topleft"])
    assert accuracy.overall.accuracy == pytest.approx(1 / 3)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no questions"):
        score([], [], [])
