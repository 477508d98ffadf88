"""A run of neighbouring entries of one source: parsed, checked, measured. The unit of parallel indexing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from alignkd.config.schema import DataSource
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample, parse_sample
from alignkd.data.templates import Part, conversation_parts, embedded_lengths, template_problem
from alignkd.data.token_counts import TokenCounter
from alignkd.errors import AlignkdError, FileSystemError, UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]
COLUMNS = ("entry", "start", "stop", "image_count", "length")
_SPACES = b" \t\n\r"
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
    """What became of entries; ``columns`` [len(COLUMNS), kept]."""

    columns: IntArray
    removed: Counter[str]
    failed: int | None = None  # first entry that must not be skipped


def index_part(
    file: JsonListFile,
    separators: IntArray,
    first: int,
    stop: int,
    settings: PartSettings,
    counter: TokenCounter,
) -> IndexPart:
    """Entries ``first`` to ``stop``; entry n lies between ``separators`` n and n + 1. Raises nothing that an
    entry can cause: ``failed`` says where :func:`checked_region` would."""
    begin = int(separators[first]) + 1
    raw = file.read(begin, int(separators[stop]))
    bounds = (separators[first : stop + 1] - begin).tolist()
    usable: list[tuple[int, int, int, int]] = []  # entry, start, stop, images
    conversations: list[list[Part]] = []
    removed: Counter[str] = Counter()
    failed = None
    for entry, (before, after) in enumerate(pairwise(bounds), first):
        region = raw[before + 1 : after]
        start = begin + after - len(region.lstrip(_SPACES))
        end = begin + before + 1 + len(region.rstrip(_SPACES))
        try:
            sample, parts = _checked(file.parsed(region, start, end), settings, entry)
        except BadSample as bad:
            if settings.skip_bad:
                removed[bad.reason] += 1
                continue
            failed = entry
            break
        except AlignkdError:
            failed = entry
            break
        usable.append((entry, start, end, len(sample.images)))
        conversations.append(parts)
    lengths = embedded_lengths(conversations, counter, settings.vision_tokens)
    fits = lengths <= settings.max_length
    if not fits.all():
        removed[TOO_LONG] = int((~fits).sum())
    columns = np.array(usable, dtype=np.int64).reshape(len(usable), 4)
    columns = np.column_stack([columns, lengths])[fits]
    return IndexPart(columns.T, removed, failed)


def raise_problem(file: JsonListFile, separators: IntArray, entry: int, settings: PartSettings) -> None:
    """Raises what :func:`index_part` met at ``entry``."""
    start, end = int(separators[entry]) + 1, int(separators[entry + 1])
    try:
        value = file.parsed(file.read(start, end), start, end)
    except UserError:
        file.raise_syntax_error()  # with line and column
        raise
    _checked(value, settings, entry)
    raise FileSystemError(f"{file.path}: read twice, entry {entry} was not the same; try again")


def _checked(value: Any, settings: PartSettings, entry: int) -> tuple[Sample, list[Part]]:
    sample = checked_sample(value, settings.source, settings.number, entry)
    return sample, conversation_parts(sample.turns, settings.source.template)


def checked_sample(value: Any, source: DataSource, number: int, entry: int) -> Sample:
    """One entry of ``source``, checked against the source's settings too; raises BadSample."""
    sample = parse_sample(value, source.file, number, entry)
    if problem := template_problem(sample.turns, source.template):
        raise BadSample(source.file, entry, sample.id, "does not fit the template", problem)
    if sample.images and source.image_folder is None:
        # Not a matter of one sample: skipping would silently drop every image of the source.
        raise UserError(
            f"data.sources[{number}].image_folder is not set, but entry {entry} of {source.file} has an image"
        )
    return sample
