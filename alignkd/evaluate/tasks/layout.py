"""Where the files of a benchmark lie, and the one error that lists all that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError

EVAL_ZIP = (
    "LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy "
    "(docs/Evaluation.md of github.com/haotian-liu/LLaVA)"
)


@dataclass(frozen=True)
class Needed:
    """A file or a folder of a benchmark."""

    name: str
    places: tuple[str, ...]  # below the task's folder; the first is the one we document
    published: str  # where
    for_scoring: bool = True  # otherwise for asking only
    is_folder: bool = False


@dataclass(frozen=True)
class Layout:
    task: str
    folders: tuple[str, ...]  # below the data folder; the first is the one we document
    needed: tuple[Needed, ...]

    def path(self, data: Path, name: str) -> Path:
        """The file ``name``, maybe with ``.gz`` at its end; raises MissingData."""
        needed = next(needed for needed in self.needed if needed.name == name)
        found = self.find(data, name)
        if found is None:
            raise MissingData(data, [(self, needed)])
        return found

    def find(self, data: Path, name: str) -> Path | None:
        needed = next(needed for needed in self.needed if needed.name == name)
        return _first_existing(self.root(data), needed)

    def root(self, data: Path) -> Path:
        """The task's folder: one of ``folders``, or ``data`` itself if the task's files lie there."""
        named = [data / folder for folder in self.folders]
        for folder in named:
            if any(_first_existing(folder, needed) for needed in self.needed):
                return folder
        return data if any(_tells(data, needed) for needed in self.needed) else named[0]

    def missing(self, data: Path, *, scoring_only: bool) -> list[Needed]:
        root = self.root(data)
        return [
            needed
            for needed in self.needed
            if (needed.for_scoring or not scoring_only) and _first_existing(root, needed) is None
        ]


class MissingData(UserError):
    def __init__(self, data: Path, missing: Sequence[tuple[Layout, Needed]]) -> None:
        one = len(missing) == 1
        count = "a file or folder is" if one else f"{len(missing)} files or folders are"
        lines = [f"{data}: {count} missing; they must lie like this:"]
        for layout, needed in missing:
            place = f"{layout.folders[0]}/{needed.places[0]}" + ("/" if needed.is_folder else "")
            lines.append(f"  {data / place}{'/' if needed.is_folder else ''}")
            others = [f"{layout.folders[0]}/{other}" for other in needed.places[1:]]
            also = f" (also found as {', '.join(others)})" if others else ""
            lines.append(f"      {layout.task}: published in {needed.published}{also}")
        super().__init__("\n".join(lines))


def require(layouts: Sequence[Layout], data: Path, *, scoring_only: bool) -> None:
    """Raises MissingData, once for all tasks."""
    missing = [
        (layout, needed) for layout in layouts for needed in layout.missing(data, scoring_only=scoring_only)
    ]
    if missing:
        raise MissingData(data, missing)


def _tells(data: Path, needed: Needed) -> bool:
    """Whether ``data`` itself is the task's folder: "images" in it may be another benchmark's."""
    if needed.is_folder:
        return needed.for_scoring and (data / needed.places[0]).is_dir()
    return _first_existing(data, needed) is not None


def _first_existing(root: Path, needed: Needed) -> Path | None:
    for place in needed.places:
        if needed.is_folder:
            if (root / place).is_dir():
                return root / place
            continue
        for file in (root / place, root / f"{place}.gz"):
            if file.is_file():
                return file
    return None
