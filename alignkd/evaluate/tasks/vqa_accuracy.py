"""VQA accuracy as TextVQA computes it: answers are normalised, and ten people's answers each give a part.

The rules, with their oddities, are those of the official evaluation: the order of the steps matters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

PEOPLE = 10  # answers per question
_ENOUGH = 3  # as many equal answers count as fully right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # commas and question marks are gone before
# The original's look-behind for a digit is misspelt and never fires, and its flag lands in `count`: 32 dots.
_DOT = re.compile(r"\.(?!\d)")
_MOST_DOTS = 32
_ARTICLES = frozenset({"a", "an", "the"})
_ONE_TO_TEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate(_ONE_TO_TEN, start=1)
}
# Mended where the apostrophe is missing.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905
# Mended where one of two is missing.
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()  # noqa: SIM905
_IRREGULAR = {
    "somebody'd": "somebodyd",  # the wrong way round in the original
    "'ows'at": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    mended = {word.replace("'", ""): word for word in _ONE_APOSTROPHE}
    for word in _TWO_APOSTROPHES:
        first, second, third = word.split("'")
        mended[f"{first}{second}'{third}"] = word
        mended[f"{first}'{second}{third}"] = word
    return mended | _IRREGULAR


_CONTRACTIONS = _contractions()


@cache
def normalised(text: str) -> str:
    """The form in which two answers are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space else " ")
    bare = _DOT.sub("", bare, count=_MOST_DOTS)
    words = [_NUMBERS.get(word, word) for word in bare.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """0 to 1: the mean over ``answers`` of min(1, matches among the others / 3).

    With ten answers, 0, 1, 2, 3 and 4 matches give 0, 0.3, 0.6, 0.9 and 1.
    """
    given = normalised(text)
    matches = [normalised(answer) == given for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / _ENOUGH) for match in matches) / len(matches)
