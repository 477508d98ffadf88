"""Parses, checks and measures consecutive entries of one source: the unit of parallel indexing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.config.schema import DataSource
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample, parse_sample
from alignkd.data.templates import Part, conversation_parts, embedded_lengths, template_problem
from alignkd.data.token_counts import TokenCounter
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]
COLUMNS = ("entry", "start", "stop", "image_count", "length")
TOO_LONG = "too long"


@dataclass(frozen=True)
class PartSettings:
    source: DataSource
    number: int  # of the source
    vision_tokens: int
    max_length: int
    skip_bad: bool


@dataclass(frozen=True)
class IndexPart:
    """The index of some entries; ``columns`` [len(COLUMNS), kept], int64."""

    columns: IntArray
    removed: Counter[str]


def index_part(
    file: JsonListFile, first: int, ranges_E2: IntArray, settings: PartSettings, counter: TokenCounter
) -> IndexPart:
    """Index the entries in these byte ranges, numbered from ``first``. Raises UserError, or BadSample for a
    bad entry that must not be skipped."""
    begin = int(ranges_E2[0, 0])
    raw = file.read(begin, int(ranges_E2[-1, 1]))
    usable: list[tuple[int, int, int, int]] = []  # entry, start, stop, images
    conversations: list[list[Part]] = []
    removed: Counter[str] = Counter()
    for entry, (start, stop) in enumerate(ranges_E2.tolist(), first):
        value = file.parsed_again(raw[start - begin : stop - begin], start, stop)
        try:
            sample = checked_sample(value, settings.source, settings.number, entry)
        except BadSample as bad:
            if not settings.skip_bad:
                raise
            removed[bad.reason] += 1
            continue
        usable.append((entry, start, stop, len(sample.images)))
        conversations.append(conversation_parts(sample.turns, settings.source.template))
    lengths = embedded_lengths(conversations, counter, settings.vision_tokens)
    fits = lengths <= settings.max_length
    if not fits.all():
        removed[TOO_LONG] = int((~fits).sum())
    columns = np.array(usable, dtype=np.int64).reshape(len(usable), 4)
    return IndexPart(np.column_stack([columns, lengths])[fits].T, removed)


def checked_sample(value: Any, source: DataSource, number: int, entry: int) -> Sample:
    """One entry of ``source``, checked against the settings of the source, too; raises BadSample."""
    sample = parse_sample(value, source.file, number, entry)
    if problem := template_problem(sample.turns, source.template):
        raise BadSample(source.file, entry, sample.id, "does not fit the template", problem)
    if sample.images and source.image_folder is None:
        # Not a bad sample: skipping would silently drop every image of the source.
        raise UserError(
            f"data.sources[{number}].image_folder is not set, but entry {entry} of {source.file} has an image"
        )
    return sample
