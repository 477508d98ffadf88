"""The attention maps of ``python -m alignkd.report``, as cells to draw over each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.report.numbers import percent

_TITLES = {"teacher": "teacher", "start": "student before", "student": "student after"}
_STRONGEST = 0.75  # opacity of the token that gets most


@dataclass(frozen=True)
class Cell:
    x: int
    y: int
    opacity: float  # 0 for a token that gets nothing, by the strongest of the same map
    in_focus: bool  # of the top K


@dataclass(frozen=True)
class Overlay:
    title: str
    cells: tuple[Cell, ...]
    note: str


@dataclass(frozen=True)
class FocusPicture:
    question: str
    answer: str
    image: str  # data URI
    side: int  # vision tokens per side
    overlays: tuple[Overlay, ...]


def focus_pictures(maps: Mapping[str, Any]) -> list[FocusPicture]:
    """``maps`` as ``alignkd.report.attention_maps`` returns them."""
    return [
        FocusPicture(
            sample["question"],
            sample["answer"],
            sample["image"],
            maps["side"],
            tuple(_overlays(sample["maps"], maps["side"], maps["top_k"])),
        )
        for sample in maps["samples"]
    ]


def _overlays(maps: Mapping[str, list[float]], side: int, top_k: int) -> list[Overlay]:
    focus = {name: strongest(shares, top_k) for name, shares in maps.items()}
    overlays = []
    for name, shares in maps.items():
        most = max(shares) or 1.0
        cells = tuple(
            Cell(token % side, token // side, round(_STRONGEST * share / most, 3), token in focus[name])
            for token, share in enumerate(shares)
        )
        note = f"{percent(sum(shares))} of a text token's attention"
        if name != "teacher" and focus.get("teacher"):
            shared = len(focus[name] & focus["teacher"])
            note += f"; {shared} of {len(focus[name])} focus tokens are the teacher's"
        overlays.append(Overlay(_TITLES[name], cells, note))
    return overlays


def strongest(shares: list[float], top_k: int) -> set[int]:
    """Numbers of the ``top_k`` tokens that get most; none where all of them are."""
    if top_k >= len(shares):
        return set()
    return set(sorted(range(len(shares)), key=lambda token: -shares[token])[:top_k])
