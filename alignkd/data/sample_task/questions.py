"""The texts of the sample task: captions, and questions with one short answer.

Every text is made from the word lists here, so that a tokenizer can be trained on all of them
(:func:`all_texts`) before any sample is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignkd.data.sample_task.digits import Grid

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
POSITION_QUESTION = "Which digit is {position}?"
COUNT_QUESTION = "How many times is {digit} there?"
ROW_QUESTION = "Which row has the larger sum?"
COLUMN_QUESTION = "Which column has the larger sum?"
LARGEST_QUESTION = "What is the largest digit?"
TWO_IMAGES_QUESTION = "Which digit is {position} in the {which} image?"
TEXT_QUESTION = "What is {first} plus {second}?"
LARGEST_SUMMAND = 4  # few enough sums to be memorised from a few hundred questions
WHICH = ("first", "second")
SIDES = {"row": ("top", "bottom"), "column": ("left", "right")}
EQUAL = "equal"

# The share of each kind of question. The position is what a model learns within minutes.
KINDS = {
    "position": 0.7,
    "count": 0.06,
    "row": 0.06,
    "column": 0.06,
    "largest": 0.06,
    "two_images": 0.03,
    "text": 0.03,
}


@dataclass(frozen=True)
class Question:
    """``text`` has no image markers; ``answer`` is the complete answer."""

    kind: str
    text: str
    answer: str


def caption(grid: Grid) -> str:
    """Names every cell in reading order; this is what grounding is learnt from.

    With a random order, the same model was still guessing when the fixed order was almost learnt.
    """
    return " ".join(f"{position} {digit}" for position, digit in zip(POSITIONS, grid.digits, strict=True))


def images_of(kind: str) -> int:
    """The number of images that a question of ``kind`` is about."""
    return {"two_images": 2, "text": 0}.get(kind, 1)


def draw_kind(random: np.random.Generator) -> str:
    return str(random.choice(list(KINDS), p=list(KINDS.values())))


def draw_question(kind: str, grids: list[Grid], random: np.random.Generator) -> Question:
    """A question of ``kind`` about ``grids``, one per image of the kind."""
    if kind == "text":
        first, second = (int(number) for number in random.integers(LARGEST_SUMMAND + 1, size=2))
        return Question(kind, TEXT_QUESTION.format(first=first, second=second), str(first + second))
    if kind == "two_images":
        image, cell = int(random.integers(2)), int(random.integers(4))
        text = TWO_IMAGES_QUESTION.format(position=POSITIONS[cell], which=WHICH[image])
        return Question(kind, text, str(grids[image].digits[cell]))
    (grid,) = grids
    if kind == "position":
        cell = int(random.integers(4))
        return Question(kind, POSITION_QUESTION.format(position=POSITIONS[cell]), str(grid.digits[cell]))
    if kind == "count":
        # Half of the time a digit that is present: otherwise nearly every answer would be 0.
        present = random.random() < 0.5
        digit = grid.digits[int(random.integers(4))] if present else int(random.integers(10))
        return Question(kind, COUNT_QUESTION.format(digit=digit), str(grid.digits.count(digit)))
    if kind == "largest":
        return Question(kind, LARGEST_QUESTION, str(max(grid.digits)))
    a, b, c, d = grid.digits
    text, sums = (ROW_QUESTION, (a + b, c + d)) if kind == "row" else (COLUMN_QUESTION, (a + c, b + d))
    answer = EQUAL if sums[0] == sums[1] else SIDES[kind][int(sums[1] > sums[0])]
    return Question(kind, text, answer)


def all_texts() -> list[str]:
    """Every sentence pattern with every word that can occur in it."""
    numbers = " ".join(str(number) for number in range(10))
    return [
        *POSITIONS,
        *(POSITION_QUESTION.format(position=position) for position in POSITIONS),
        *(
            TWO_IMAGES_QUESTION.format(position=position, which=which)
            for position in POSITIONS
            for which in WHICH
        ),
        COUNT_QUESTION.format(digit=numbers),
        TEXT_QUESTION.format(first=numbers, second=numbers),
        ROW_QUESTION,
        COLUMN_QUESTION,
        LARGEST_QUESTION,
        EQUAL,
    ]
