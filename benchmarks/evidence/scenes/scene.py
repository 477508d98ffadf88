"""Scenes: one to six cut-outs on a part of a photograph, in the cells of a grid of three by three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.evidence.scenes.cutouts import CATEGORIES, Cutout, Sources

SIDE = 256  # pixels
CELLS = 3  # per side
POSITIONS = (
    "top left",
    "top center",
    "top right",
    "middle left",
    "middle center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
LARGEST_SCENE = 6  # cut-outs
LARGEST_COUNT = 4  # of one category
SMALLEST = 52  # pixels of a cut-out's longer side
FADED = 0.35  # towards white: many cut-outs are black
OF_THE_GROUP = (
    0.6  # share of a scene's categories that are of one group: the others make adversarial negatives
)
GROUP_OF = {one.name: one.group for one in CATEGORIES}
_MEMBERS = {
    group: [name for name, of in GROUP_OF.items() if of == group]
    for group in dict.fromkeys(GROUP_OF.values())
}
POPULARITY = {name: 1 / (1 + rank) for names in _MEMBERS.values() for rank, name in enumerate(names)}


@dataclass(frozen=True)
class Item:
    category: str
    cell: int  # in reading order
    cutout: str  # its file
    box: tuple[int, int, int, int]  # left, top, width and height in pixels


@dataclass(frozen=True)
class Scene:
    split: str
    group: str
    photograph: int
    crop: tuple[float, float, float]  # left and top of the square that is shown and its side, as shares
    mirrored: bool  # the photograph
    items: tuple[Item, ...]

    def counts(self) -> dict[str, int]:
        """How many cut-outs of each category that is shown."""
        shown = [item.category for item in self.items]
        return {name: shown.count(name) for name in dict.fromkeys(shown)}

    def single(self) -> list[Item]:
        """Those that are the only ones of their category."""
        return [item for item in self.items if self.counts()[item.category] == 1]


def draw_scene(sources: Sources, split: str, random: np.random.Generator) -> Scene:
    group = str(random.choice(list(_MEMBERS)))
    count = int(random.integers(1, LARGEST_SCENE + 1))
    repeated = int(random.integers(1, min(count, LARGEST_COUNT) + 1))
    names = [draw_category(group, random)]
    names *= repeated
    while len(names) < count:
        name = draw_category(group, random)
        if name not in names:
            names.append(name)
    cells = random.permutation(CELLS**2)[:count].tolist()
    items = tuple(
        _place(sources.of(split, name), name, cell, random) for name, cell in zip(names, cells, strict=True)
    )
    side = float(random.uniform(0.5, 1.0))
    left, top = (float(random.uniform(0.0, 1.0 - side)) for _ in range(2))
    photograph = int(random.integers(len(sources.photographs)))
    return Scene(split, group, photograph, (left, top, side), bool(random.integers(2)), items)


def draw_category(group: str, random: np.random.Generator) -> str:
    """Popular categories more often, and those of ``group``."""
    names = _MEMBERS[group] if random.random() < OF_THE_GROUP else list(POPULARITY)
    weights = np.array([POPULARITY[name] for name in names])
    return str(random.choice(names, p=weights / weights.sum()))


def _place(cutouts: Sequence[Cutout], name: str, cell: int, random: np.random.Generator) -> Item:
    cutout = cutouts[int(random.integers(len(cutouts)))]
    room = SIDE // CELLS
    longest = int(random.integers(SMALLEST, room + 1))
    factor = longest / max(cutout.image.size)
    width, height = (max(1, round(length * factor)) for length in cutout.image.size)
    left = cell % CELLS * room + int(random.integers(0, room - width + 1))
    top = cell // CELLS * room + int(random.integers(0, room - height + 1))
    return Item(name, cell, cutout.name, (left, top, width, height))


def render(scene: Scene, sources: Sources) -> Image.Image:
    """RGB, 256 x 256."""
    photograph = sources.photographs[scene.photograph]
    left, top, side = (share * min(photograph.size) for share in scene.crop)
    image = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    if scene.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = Image.blend(image, Image.new("RGB", image.size, "white"), FADED)
    for item in scene.items:
        cutout = next(one for one in sources.of(scene.split, item.category) if one.name == item.cutout)
        shown = cutout.image.resize(item.box[2:], Image.Resampling.BILINEAR)
        image.paste(shown, item.box[:2], shown)
    return image
