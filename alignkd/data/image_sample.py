"""Are the images what they were? A few hundred of them, by size and time: to read all would take hours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np

from alignkd.config.schema import DataSection
from alignkd.data.image_paths import BadImage, resolve_below
from alignkd.data.index import Index
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import parse_sample

SAMPLES = 256


def image_sample(data: DataSection, index: Index) -> dict[str, str]:
    """Hashes over ``sizes`` and ``times`` (of the last write) of the first image of :data:`SAMPLES` samples,
    evenly spread over the index. Without paths: images may move. An image that is missing counts as such, and
    fails where it is read. Raises FileSystemError."""
    found = [
        _look(str(data.sources[source].image_folder), path) for source, path in image_places(data, index)
    ]
    return {"sizes": _hash([size for size, _ in found]), "times": _hash([time for _, time in found])}


def image_places(data: DataSection, index: Index) -> Iterator[tuple[int, str]]:
    """(number of the source, path) of each image of the sample."""
    with_image = np.flatnonzero(index.image_count)
    places = np.linspace(0, len(with_image) - 1, min(SAMPLES, len(with_image))).round().astype(int)
    files = [JsonListFile(source.file) for source in data.sources]
    for number in with_image[places]:
        source = int(index.source[number])
        value = files[source].entry(int(index.start[number]), int(index.stop[number]))
        sample = parse_sample(value, data.sources[source].file, source, int(index.entry[number]))
        yield source, sample.images[0]


def _look(folder: str, path: str) -> tuple[int, int] | tuple[None, None]:
    try:
        found = resolve_below(folder, path).stat()
    except BadImage:
        return None, None
    return found.st_size, found.st_mtime_ns


def _hash(values: list[int | None]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
