import pytest

from alignkd.evaluate.tasks.letters import mmbench_letter, scienceqa_letter

OPTIONS = {"A": "a red car", "B": "bus", "C": "None"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),
        ("AB", None),
        ("", None),
        ("b", None),
        ("B ", None),  # answers are stripped when they are made
        ("B. the bus", "B"),
        ("B. ", "B"),
        ("B.", None),  # too short for the second rule
        ("F. the bus", None),
        ("B.the bus", None),
        ("I think the bus. The answer is B.", "B"),
        ("The answer is B, sure", "B"),  # the rule's dot is any character
        ("The answer is B", None),
        ("The answer is B. The answer is C.", None),  # exactly one
        ("The answer is Z.", "Z"),  # found, and wrong: no question has it
        ("the answer is B.", None),
    ],
)
def test_scienceqa_rules_in_their_order(text, letter):
    assert scienceqa_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("*B*: it is #1", "B"),
        ("B. a red car", "B"),  # the letter goes before the text
        ("D", None),  # no such option
        ("b", None),
        ("It is option B", "B"),
        ("B one two three four", "B"),  # fifth from the end
        ("B one two three four five", None),
        ("B or C", None),
        ("B or C, the correct answer is B", "B"),
        ("B or C, so the answer is: (C)", "C"),
        ("B or C, so the answer is D", None),
        ("A or B, the answer is a bus", "B"),  # "a" is an article here; then the text
        ("I see A BUS", "A"),  # a word of one letter is a letter
        ("I see the BUS", "B"),
        ("none", "C"),
        ("a red car or a bus", None),  # two options' texts
        ("something else", None),
        ("", None),
    ],
)
def test_mmbench_rules_in_their_order(text, letter):
    assert mmbench_letter(text, OPTIONS) == letter
