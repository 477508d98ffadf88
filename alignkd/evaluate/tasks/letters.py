"""Find the option letter in an answer, by the rules of ScienceQA and of MMBench."""

from __future__ import annotations

import re
from collections.abc import Mapping

SCIENCEQA_OPTIONS = "ABCDE"
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the dot is any character, as in the original
_ANSWER_IS = re.compile(r"\b(?i:answer is) ([A-Z])\b")  # "a" would be an article
_AS_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5


def scienceqa_letter(text: str) -> str | None:
    """None where no letter is found, which counts as wrong; never a guess."""
    if len(text) == 1 and text in SCIENCEQA_OPTIONS:
        return text
    if len(text) >= 3 and text[0] in SCIENCEQA_OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else None


def mmbench_letter(text: str, options: Mapping[str, str]) -> str | None:
    """``options``: letter -> text. None where no option can be told, which counts as wrong."""
    words = text.translate(_AS_SPACES).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and named[0] in words[-_LAST_WORDS:]:
        return named[0]
    found = _ANSWER_IS.search(" ".join(words))
    if found and found[1] in options:
        return found[1]
    quoted = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else None
