"""Parses, checks and measures consecutive entries of one source: the unit of parallel indexing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.config.schema import DataSource
from alignkd.data.encoder import SampleEncoder
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample, parse_sample
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]
COLUMNS = ("entry", "start", "stop", "image_count", "length")
TOO_LONG = "too long"


@dataclass(frozen=True)
class PartSettings:
    source: DataSource
    number: int  # of the source
    max_length: int
    skip_bad: bool


@dataclass(frozen=True)
class IndexPart:
    """The index of some entries; ``columns`` [len(COLUMNS), kept], int64."""

    columns: IntArray
    removed: Counter[str]


def index_part(
    file: JsonListFile, first: int, ranges_E2: IntArray, settings: PartSettings, encoder: SampleEncoder
) -> IndexPart:
    """Index the entries in these byte ranges, numbered from ``first``. Raises UserError, or BadSample for a
    bad entry that must not be skipped."""
    begin = int(ranges_E2[0, 0])
    raw = file.read(begin, int(ranges_E2[-1, 1]))
    usable: list[tuple[int, int, int, int]] = []  # entry, start, stop, images
    samples: list[Sample] = []
    removed: Counter[str] = Counter()

    def remove(bad: BadSample) -> None:
        if not settings.skip_bad:
            raise bad
        removed[bad.reason] += 1

    for entry, (start, stop) in enumerate(ranges_E2.tolist(), first):
        value = file.parsed_again(raw[start - begin : stop - begin], start, stop)
        try:
            sample = checked_sample(value, settings.source, settings.number, entry, encoder)
        except BadSample as bad:
            remove(bad)
            continue
        usable.append((entry, start, stop, len(sample.images)))
        samples.append(sample)
    kept, known = [], []
    for place, length in zip(usable, encoder.length(samples, settings.source), strict=True):
        if isinstance(length, BadSample):
            remove(length)
            continue
        kept.append(place)
        known.append(length)
    lengths = np.array(known, dtype=np.int64)
    fits = lengths <= settings.max_length
    if not fits.all():
        removed[TOO_LONG] = int((~fits).sum())
    columns = np.array(kept, dtype=np.int64).reshape(len(kept), 4)
    return IndexPart(np.column_stack([columns, lengths])[fits].T, removed)


def checked_sample(value: Any, source: DataSource, number: int, entry: int, encoder: SampleEncoder) -> Sample:
    """One entry of ``source``, checked against the settings of the source, too; raises BadSample."""
    sample = parse_sample(value, source.file, number, entry)
    encoder.check(sample, source)
    if sample.images and source.image_folder is None:
        # Not a bad sample: skipping would silently drop every image of the source.
        raise UserError(
            f"data.sources[{number}].image_folder is not set, but entry {entry} of {source.file} has an image"
        )
    return sample
