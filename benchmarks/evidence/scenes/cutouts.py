"""The cut-outs of Debian's ``tuxpaint-stamps-default`` by category, and photographs to put them on.

Neither is part of this repository (the cut-outs are GPL-2); docs/evidence.md says how to fetch them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

STAMPS = Path("usr/share/tuxpaint/stamps")  # in the unpacked Debian package
PHOTOGRAPHS = Path("skimage/data")  # in the installed PyPI package
# Photographs that show nothing of the categories below.
NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "clock_motion.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
)
LARGEST_CUTOUT = 96  # pixels of the longer side, more than a scene ever shows
SPLITS = {"train": 0.60, "validation": 0.15, "test": 0.25}


@dataclass(frozen=True)
class Category:
    name: str
    plural: str
    group: str  # of categories that are shown together more often than others
    folders: tuple[str, ...]  # with everything below them


# In each group the most popular category comes first.
CATEGORIES = (
    Category("bird", "birds", "animals", ("animals/birds",)),
    Category("mammal", "mammals", "animals", ("animals/mammals", "animals/marsupials")),
    Category("insect", "insects", "animals", ("animals/insects",)),
    Category("fish", "fish", "animals", ("animals/fish",)),
    Category("fruit", "fruits", "plants", ("food/fruit",)),
    Category("flower", "flowers", "plants", ("plants/flowers",)),
    Category("vegetable", "vegetables", "plants", ("food/vegetables",)),
    Category("house", "houses", "town", ("town/houses",)),
    Category("vehicle", "vehicles", "town", ("vehicles",)),
    Category("road sign", "road signs", "town", ("town/roadsigns",)),
    Category("monument", "monuments", "town", ("town/monuments",)),
    Category(
        "coin", "coins", "objects", ("symbols/money/us", "symbols/money/euro", "symbols/money/canadian")
    ),
    Category("garment", "garments", "objects", ("clothes",)),
    Category("tool", "tools", "objects", ("household/tools",)),
    Category("instrument", "instruments", "objects", ("hobbies/music",)),
    Category("letter", "letters", "signs", ("symbols/alphabets/english/filled",)),
    Category("hand sign", "hand signs", "signs", ("symbols/alphabets/asl",)),
    Category("chess piece", "chess pieces", "signs", ("symbols/chess",)),
    Category("planet", "planets", "signs", ("space/planets",)),
)
# Parts of things, and mirror images: one of them would be in the training data when the other is not.
LEFT_OUT = ("7spoke256", "wheel_tractor", "button", "clothespin_new", "clothespin_old")


@dataclass(frozen=True)
class Cutout:
    category: str
    name: str  # of its file, below the folder of all
    image: Image.Image  # RGBA, without an empty margin


@dataclass(frozen=True)
class Sources:
    """All pictures that scenes are made of."""

    cutouts: Mapping[str, Mapping[str, Sequence[Cutout]]]  # by split and category
    photographs: Sequence[Image.Image]
    digest: str  # of the files

    def of(self, split: str, category: str) -> Sequence[Cutout]:
        return self.cutouts[split][category]


def read_sources(folder: Path) -> Sources:
    """``folder`` holds the unpacked Debian package in ``stamps`` and the PyPI packages in ``packages``."""
    stamps = folder / "stamps" / STAMPS
    found = {
        category.name: sorted(path for part in category.folders for path in _pictures(stamps / part))
        for category in CATEGORIES
    }
    photographs = [folder / "packages" / PHOTOGRAPHS / name for name in NAMES]
    missing = [name for name, paths in found.items() if not paths]
    if missing or not all(path.exists() for path in photographs):
        raise SystemExit(
            f"{folder} lacks the pictures of the scenes; docs/evidence.md says how to fetch them"
        )
    digest = hashlib.sha256()
    for path in (*(path for paths in found.values() for path in paths), *photographs):
        digest.update(path.read_bytes())
    cutouts = {
        name: [Cutout(name, str(path.relative_to(stamps)), read_cutout(path)) for path in paths]
        for name, paths in found.items()
    }
    return Sources(
        split_cutouts(cutouts), [Image.open(path).convert("RGB") for path in photographs], digest.hexdigest()
    )


def split_cutouts(cutouts: Mapping[str, Sequence[Cutout]]) -> dict[str, dict[str, list[Cutout]]]:
    """No cut-out is in two splits, and every split has some of every category."""
    splits: dict[str, dict[str, list[Cutout]]] = {split: {} for split in SPLITS}
    for number, (category, some) in enumerate(cutouts.items()):
        order = np.random.default_rng([0, number]).permutation(len(some)).tolist()
        test = max(1, round(len(some) * SPLITS["test"]))
        validation = max(1, round(len(some) * SPLITS["validation"]))
        for split, part in (
            ("test", order[:test]),
            ("validation", order[test : test + validation]),
            ("train", order[test + validation :]),
        ):
            splits[split][category] = [some[index] for index in part]
    return splits


def read_cutout(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((LARGEST_CUTOUT, LARGEST_CUTOUT), Image.Resampling.LANCZOS)
    return image


def _pictures(folder: Path) -> Iterable[Path]:
    return (
        path
        for path in folder.rglob("*.png")
        if path.stem not in LEFT_OUT and not path.stem.endswith("_mirror")
    )
