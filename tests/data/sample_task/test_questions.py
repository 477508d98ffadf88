import re
from collections import Counter

import numpy as np
import pytest

from alignkd.data.sample_task.digits import Grid
from alignkd.data.sample_task.questions import (
    KINDS,
    all_texts,
    caption,
    draw_kind,
    draw_question,
    images_of,
)

FIRST = Grid((3, 5, 5, 9), np.zeros((32, 32), np.uint8))
SECOND = Grid((0, 1, 2, 4), np.zeros((32, 32), np.uint8))
TIE = Grid((1, 2, 2, 1), np.zeros((32, 32), np.uint8))

# Written out by hand for the two grids.
ANSWERS = {
    "Which digit is top left?": "3",
    "Which digit is top right?": "5",
    "Which digit is bottom left?": "5",
    "Which digit is bottom right?": "9",
    "How many times is 5 there?": "2",
    "How many times is 3 there?": "1",
    "How many times is 9 there?": "1",
    "How many times is 0 there?": "0",
    "Which row has the larger sum?": "bottom",
    "Which column has the larger sum?": "right",
    "What is the largest digit?": "9",
    "Which digit is top left in the first image?": "3",
    "Which digit is top left in the second image?": "0",
    "Which digit is bottom right in the second image?": "4",
    "What is 3 plus 4?": "7",
}


def drawn(kind, grids, count=400):
    random = np.random.default_rng(0)
    return [draw_question(kind, grids, random) for _ in range(count)]


def grids_for(kind):
    return [FIRST, SECOND][: images_of(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_worked_out_by_hand(kind):
    questions = drawn(kind, grids_for(kind))
    checked = [question for question in questions if question.text in ANSWERS]
    assert checked
    for question in checked:
        assert question.kind == kind
        assert question.answer == ANSWERS[question.text]


def test_equal_sums_are_called_equal():
    assert drawn("row", [TIE], 1)[0].answer == "equal"
    assert drawn("column", [TIE], 1)[0].answer == "equal"


def test_count_asks_for_present_and_for_absent_digits():
    answers = Counter(question.answer for question in drawn("count", [SECOND]))
    assert answers["0"] > 100
    assert answers["1"] > 100


def test_caption_names_every_cell():
    assert caption(FIRST) == "top left 3 top right 5 bottom left 5 bottom right 9"


def test_kinds_are_drawn_in_their_shares():
    random = np.random.default_rng(0)
    counts = Counter(draw_kind(random) for _ in range(4000))
    for kind, share in KINDS.items():
        assert counts[kind] / 4000 == pytest.approx(share, abs=0.03)


def test_all_texts_hold_every_word_of_every_question():
    def words(text):
        return set(re.findall(r"\w+|\?", text))

    known = set().union(*map(words, all_texts()))
    for kind in KINDS:
        for question in drawn(kind, grids_for(kind), 200):
            assert words(question.text) | words(question.answer) <= known
    assert words(caption(FIRST)) <= known
