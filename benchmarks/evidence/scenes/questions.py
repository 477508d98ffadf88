"""Questions about a scene, one kind for each sort that the six benchmarks ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from alignkd.data.sample_task.questions import Question
from benchmarks.evidence.scenes.cutouts import CATEGORIES
from benchmarks.evidence.scenes.scene import (
    CELLS,
    GROUP_OF,
    LARGEST_COUNT,
    POPULARITY,
    POSITIONS,
    Scene,
)

LETTERS = ("A", "B", "C", "D")
PLURAL = {one.name: one.plural for one in CATEGORIES}
RELATIONS = ("left of", "right of", "above", "below")
PRESENCE_QUESTION = "Is there a {name} in the picture?"
POSITION_QUESTION = "Where is the {name}?"
COUNT_QUESTION = "How many {plural} are there?"
CATEGORY_QUESTION = "What is at the {position}?"
OPTION_QUESTION = "Which of these is in the picture?"
RELATION_QUESTION = "Is the {first} {relation} the {second}?"


def caption(scene: Scene) -> str:
    """Names every cut-out in reading order."""
    items = sorted(scene.items, key=lambda item: item.cell)
    return " ".join(f"{POSITIONS[item.cell]} {item.category}" for item in items)


def ask(kind: str, scene: Scene, random: np.random.Generator) -> Question | None:
    """None when the scene has nothing to ask about in this way."""
    asked = _ASK[kind](scene, random)
    return None if asked is None else Question(kind, *asked)


def all_texts() -> Iterator[str]:
    """Every word that a caption, question or answer may hold."""
    for name, plural in PLURAL.items():
        yield PRESENCE_QUESTION.format(name=name)
        yield POSITION_QUESTION.format(name=name)
        yield COUNT_QUESTION.format(plural=plural)
        yield name
    for position in POSITIONS:
        yield CATEGORY_QUESTION.format(position=position)
        yield position
    for relation in RELATIONS:
        yield RELATION_QUESTION.format(first="bird", relation=relation, second="bird")
    options = " ".join(f"{letter}. bird" for letter in LETTERS)
    yield f"{OPTION_QUESTION} {options}"
    yield from ("yes", "no", *LETTERS, *map(str, range(1, LARGEST_COUNT + 1)))


Asked = tuple[str, str] | None  # question and answer


def _presence(scene: Scene, random: np.random.Generator) -> Asked:
    if random.integers(2):
        name, answer = _one_of(list(scene.counts()), random), "yes"
    else:
        name, answer = absent(scene, str(random.choice(["random", "popular", "adversarial"])), random), "no"
    return PRESENCE_QUESTION.format(name=name), answer


def absent(scene: Scene, how: str, random: np.random.Generator) -> str:
    """A category that is not shown: any, a popular one, or one that is often shown together with those that
    are (as POPE's three sets of questions)."""
    names = [name for name in POPULARITY if name not in scene.counts()]
    if how == "adversarial":
        names = [name for name in names if GROUP_OF[name] == scene.group] or names
    weights = np.array([POPULARITY[name] if how == "popular" else 1.0 for name in names])
    return str(random.choice(names, p=weights / weights.sum()))


def _position(scene: Scene, random: np.random.Generator) -> Asked:
    single = scene.single()
    if not single:
        return None
    item = single[int(random.integers(len(single)))]
    return POSITION_QUESTION.format(name=item.category), POSITIONS[item.cell]


def _count(scene: Scene, random: np.random.Generator) -> Asked:
    """About the category that is there most often: of any other, 1 would nearly always be right."""
    name, count = max(scene.counts().items(), key=lambda pair: pair[1])
    return COUNT_QUESTION.format(plural=PLURAL[name]), str(count)


def _category(scene: Scene, random: np.random.Generator) -> Asked:
    item = scene.items[int(random.integers(len(scene.items)))]
    return CATEGORY_QUESTION.format(position=POSITIONS[item.cell]), item.category


def _option(scene: Scene, random: np.random.Generator) -> Asked:
    options = [_one_of(list(scene.counts()), random)]
    while len(options) < len(LETTERS):
        name = absent(scene, str(random.choice(["random", "adversarial"])), random)
        if name not in options:
            options.append(name)
    order = random.permutation(len(LETTERS)).tolist()
    shown = " ".join(f"{letter}. {options[number]}" for letter, number in zip(LETTERS, order, strict=True))
    return f"{OPTION_QUESTION} {shown}", LETTERS[order.index(0)]


def _relation(scene: Scene, random: np.random.Generator) -> Asked:
    """Of two cut-outs in different columns (or rows)."""
    single = scene.single()
    if len(single) < 2:
        return None
    first, second = (single[number] for number in random.permutation(len(single))[:2].tolist())
    number = int(random.integers(len(RELATIONS)))
    places = [item.cell % CELLS if number < 2 else item.cell // CELLS for item in (first, second)]
    if places[0] == places[1]:
        return None
    true = (places[0] < places[1]) == (number % 2 == 0)
    text = RELATION_QUESTION.format(first=first.category, relation=RELATIONS[number], second=second.category)
    return text, "yes" if true else "no"


def _one_of(names: list[str], random: np.random.Generator) -> str:
    return names[int(random.integers(len(names)))]


_ASK: dict[str, Callable[[Scene, np.random.Generator], Asked]] = {
    "presence": _presence,
    "position": _position,
    "count": _count,
    "category": _category,
    "option": _option,
    "relation": _relation,
}
KINDS = tuple(_ASK)
