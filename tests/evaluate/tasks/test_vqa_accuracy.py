import pytest

from alignkd.evaluate.tasks.vqa_accuracy import normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YES", "yes"),
        ("10,000", "10000"),  # commas go first
        ("really?", "really"),
        ("tom's", "tom 's"),
        (" \n a\tb\n ", "b"),
        # Punctuation beside a space is deleted everywhere, else it becomes a space.
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("x -y t-shirt", "x y tshirt"),
        ("x-/y c-d", "x y c d"),  # a space that stood for another mark does not count
        ("(new) york", "new york"),
        ("(new)", "new"),
        ("a/c", "c"),
        ("stop!", "stop"),
        ("10:30", "10:30"),  # a colon is no punctuation
        ("coca_cola", "coca cola"),
        ("don't", "don't"),  # nor is an apostrophe
        # Dots stay only before a digit.
        ("2.5", "2.5"),
        ("st. john", "st john"),
        ("5.", "5"),
        (".com", "com"),
        ("u.s.a.", "usa"),
        (" ".join(["x."] * 34), " ".join(["x"] * 32 + ["x."] * 2)),
        # Numbers and articles, as whole words.
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("eleven", "eleven"),
        ("the man and an apple", "man and apple"),
        ("theatre", "theatre"),
        ("a", ""),
        # Contractions.
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("Im", "im"),  # compared in lower case, so the original's capitals never match
        ("lets", "lets"),
    ],
)
def test_normalisation_worked_out_by_hand(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)]
)
def test_each_person_is_left_out_once(matches, expected):
    # 1 of 10: left out himself, nobody agrees; nine times one of nine agrees: 9 / 10 x 1 / 3
    people = ["The Cat."] * matches + [f"dog {number}" for number in range(10 - matches)]
    assert vqa_accuracy("cat", people) == pytest.approx(expected)


def test_answers_are_normalised_on_both_sides():
    assert vqa_accuracy("Two", ["2"] * 10) == 1.0
    assert vqa_accuracy("cats", ["cat"] * 10) == 0.0
