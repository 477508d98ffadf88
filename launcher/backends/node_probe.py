"""What every node of a run must see: a script that looks, and its answers. Slurm and ssh carry it.

Run folder and checkpoints must be the same folders everywhere, so a token is written into them; models and
data only have to be there, since each node may have a copy.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths

if TYPE_CHECKING:
    from alignkd.config import Config

LATE_SECONDS = 15  # a shared file system may take this long to show a new file
# Arguments: the node's name, the token, then kind, key and path of each place.
SCRIPT = f"""\
node=$1 token=$2
shift 2
shows_token() {{
    for ((i = 0; i < {LATE_SECONDS}; i++)); do
        read -r found <"$1/.token-$token" && [[ $found == "$token" ]] && return
        sleep 1
    done
    return 1
}}
while (($#)); do
    case $1 in
        shared) shows_token "$3" && [[ -w $3 ]] ;;
        writable) mkdir -p "$3" && [[ -w $3 ]] ;;
        folder) [[ -r $3 && -x $3 && -d $3 ]] ;;
        *) [[ -r $3 && -f $3 ]] ;;
    esac 2>/dev/null && answer=yes || answer=no
    echo "$node $answer $2"
    shift 3
done
"""


@dataclass(frozen=True)
class Place:
    """``shared`` and ``writable`` are folders; only of a shared one all nodes must see the same."""

    kind: Literal["shared", "writable", "folder", "file"]
    key: str
    path: Path


def places_of(run: Path) -> list[Place]:
    """Everything that the ranks read and write."""
    found = [run_place(run)]
    checkpoints = RunPaths(run).checkpoints
    if checkpoints.exists() or checkpoints.is_symlink():  # to a larger file system, say
        found.append(Place("shared", "checkpoints", checkpoints))
    try:
        from alignkd.config import load_run_config  # here: `status` imports this module, and must be quick

        config = load_run_config(RunPaths(run).config)
    except UserError:
        return found  # the ranks say what is wrong with it
    if config.slurm.container.kind != "none":
        return found  # the ranks see other folders than this script
    return [*found, *read_places(config), Place("writable", "cache", _cache_folder(os.environ))]


def run_place(run: Path) -> Place:
    return Place("shared", "run.folder", run)


def read_places(config: Config) -> list[Place]:
    """The models and data of a run."""
    return [*_models(config), *_data(config)]


def model_folders(config: Config) -> dict[str, str]:
    """The model folders that a configuration reads, by key."""
    model = config.model
    named = {
        "model.teacher": model.teacher if config.distillation.enabled else None,
        "model.student": None if model.student == "scratch" else model.student,
        "model.student_config": model.student_config if model.student == "scratch" else None,
        "model.vision_tower": model.vision_tower,
    }
    return {key: folder for key, folder in named.items() if folder is not None}


def _models(config: Config) -> Iterator[Place]:
    for key, folder in model_folders(config).items():
        yield Place("folder", key, Path(folder))
    model, teacher = config.model, config.teacher
    if teacher.cache is not None and teacher.placement == "cached" and config.distillation.enabled:
        yield Place("folder", "teacher.cache", Path(teacher.cache))
    if model.adapters is not None and config.distillation.enabled:
        path = Path(model.adapters)
        yield Place("folder" if path.is_dir() else "file", "model.adapters", path)


def _data(config: Config) -> Iterator[Place]:
    for key, source in config.named_sources().items():
        yield Place("file", f"{key}.file", Path(source.file))
        if source.image_folder is not None:
            yield Place("folder", f"{key}.image_folder", Path(source.image_folder))
    if config.evaluation.every is not None and config.evaluation.task_data is not None:
        yield Place("folder", "evaluation.task_data", Path(config.evaluation.task_data))


def _cache_folder(environment: Mapping[str, str]) -> Path:
    """As ``alignkd.data.index_cache`` finds it, which needs numpy."""
    if given := environment.get("ALIGNKD_CACHE"):
        return Path(given)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignkd"


@contextlib.contextmanager
def tokens(places: Sequence[Place]) -> Iterator[str]:
    """The token, which is in the shared places that this process sees itself while the block runs."""
    token = uuid.uuid4().hex
    # A new name: a client may have cached that an older one is missing.
    files = [place.path / f".token-{token}" for place in places if place.kind == "shared"]
    try:
        for file in files:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                file.write_text(token + "\n", encoding="utf-8")
        yield token
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def arguments(token: str, places: Sequence[Place]) -> list[str]:
    """Of the script, after the node's name."""
    return [token, *(word for place in places for word in (place.kind, place.key, str(place.path)))]


def unseen(output: str, places: Sequence[Place], nodes: Iterable[str] = ()) -> dict[str, list[Place]]:
    """What each node that answered does not see, and each of ``nodes``, which are known to be up.

    A place without an answer counts: looking at it hangs.
    """
    by_node: dict[str, dict[str, bool]] = {node: {} for node in nodes}
    for line in output.splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[1] in ("yes", "no"):
            by_node.setdefault(words[0], {})[words[2]] = words[1] == "yes"
    return {
        node: [place for place in places if not answers.get(place.key, False)]
        for node, answers in by_node.items()
    }


def problems(found: Mapping[str, Sequence[Place]]) -> list[str]:
    """A line for each place that nodes do not see."""
    return [
        line + (": it must be on a file system that all nodes share" if place.kind == "shared" else "")
        for place, line in _lines(found)
        if place.kind != "writable"
    ]


def warnings(found: Mapping[str, Sequence[Place]]) -> list[str]:
    """A line for each place that only costs time, where it cannot be used."""
    return [f"{line}: indices are built anew" for place, line in _lines(found) if place.kind == "writable"]


def _lines(found: Mapping[str, Sequence[Place]]) -> list[tuple[Place, str]]:
    nodes: dict[Place, list[str]] = {}
    for node in sorted(found):
        for place in found[node]:
            nodes.setdefault(place, []).append(node)
    verb = {"writable": "cannot write"}
    return [
        (place, f"{', '.join(names)} {verb.get(place.kind, 'cannot see')} {place.key} = {place.path}")
        for place, names in nodes.items()
    ]
