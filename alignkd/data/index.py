"""What a run trains on: every usable sample of all sources, as arrays.

Built once (on rank 0) and sent to the other ranks; an ``Index`` is picklable and holds no per-sample objects.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample, Sample, parse_sample
from alignkd.data.templates import Part, conversation_parts, embedded_lengths, template_problem
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[int, int], None]  # bytes read so far, bytes of all files

ARRAYS = ("source", "entry", "start", "stop", "length", "image_count")
TOO_LONG = "too long"
_BLOCK = 4096  # entries that are tokenised in one call


@dataclass(frozen=True)
class SourceReport:
    """What became of the entries of one source."""

    file: str
    entries: int
    kept: int
    removed: dict[str, int]  # reason -> entries


@dataclass(frozen=True)
class Index:
    """Arrays of equal length N, one element per usable sample; int64."""

    source: IntArray  # number of the source
    entry: IntArray  # number of the entry in its file, from 0
    start: IntArray  # byte range of the entry in its file
    stop: IntArray
    length: IntArray  # embedding tokens, V for each image
    image_count: IntArray
    weights: tuple[float, ...]  # per source
    reports: tuple[SourceReport, ...]  # per source
    max_length: int
    fingerprint: str  # of everything that decides which samples there are and how they are encoded

    def __len__(self) -> int:
        return len(self.source)

    def summary(self) -> str:
        """For the log: how many samples there are, and how many were removed and why."""
        lines = [f"{report.file}: {self._describe(report)}" for report in self.reports]
        if len(lines) > 1:
            total: Counter[str] = Counter()
            for report in self.reports:
                total.update(report.removed)
            entries = sum(report.entries for report in self.reports)
            lines.append("all sources: " + self._describe(SourceReport("", entries, len(self), dict(total))))
        return "\n".join(lines)

    def _describe(self, report: SourceReport) -> str:
        bad = {reason: count for reason, count in report.removed.items() if reason != TOO_LONG}
        text = f"{report.kept:,} of {report.entries:,} samples"
        if too_long := report.removed.get(TOO_LONG):
            text += f", {too_long:,} too long (> {self.max_length})"
        if bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(bad.items()))
            text += f", {sum(bad.values()):,} bad: {reasons}"
        return text


def build_index(
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    vision_tokens: int,
    progress: Progress | None = None,
) -> Index:
    """Reads, checks and measures all sources; raises UserError when nothing is left or an entry is bad."""
    files = [JsonListFile(source.file) for source in data.sources]
    total = sum(len(file) for file in files)
    columns = _Columns()
    reports, done = [], 0
    for number, (source, file) in enumerate(zip(data.sources, files, strict=True)):
        _check_image_folder(source, number)
        removed: Counter[str] = Counter()
        entries, before = 0, len(columns.source)
        numbered = enumerate(file.ranges())
        while block := list(islice(numbered, _BLOCK)):
            checked = list(_check_block(block, file, source, number, data.on_bad_sample == "skip", removed))
            lengths = embedded_lengths([parts for _, parts, _ in checked], tokenizer, vision_tokens)
            for (sample, _, byte_range), length in zip(checked, lengths, strict=True):
                if length > data.max_length:
                    removed[TOO_LONG] += 1
                else:
                    columns.add(sample, byte_range, length)
            entries += len(block)
            if progress is not None:
                progress(done + block[-1][1][1], total)
        done += len(file)
        reports.append(SourceReport(source.file, entries, len(columns.source) - before, dict(removed)))
    if progress is not None:
        progress(total, total)

    index = Index(
        **columns.arrays(),
        weights=tuple(source.weight for source in data.sources),
        reports=tuple(reports),
        max_length=data.max_length,
        fingerprint=data_fingerprint(data, tokenizer, vision_tokens),
    )
    if len(index) == 0:
        raise UserError(f"no sample is left to train on:\n{index.summary()}")
    return index


@dataclass
class _Columns:
    source: list[int] = field(default_factory=list)
    entry: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    image_count: list[int] = field(default_factory=list)

    def add(self, sample: Sample, byte_range: tuple[int, int], length: int) -> None:
        self.source.append(sample.source)
        self.entry.append(sample.entry)
        self.start.append(byte_range[0])
        self.stop.append(byte_range[1])
        self.length.append(length)
        self.image_count.append(len(sample.images))

    def arrays(self) -> dict[str, IntArray]:
        return {name: np.array(values, dtype=np.int64) for name, values in vars(self).items()}


def _check_block(
    block: Sequence[tuple[int, tuple[int, int]]],
    file: JsonListFile,
    source: DataSource,
    number: int,
    skip: bool,
    removed: Counter[str],
) -> Iterator[tuple[Sample, list[Part], tuple[int, int]]]:
    """The usable samples of a block with their parts; bad ones raise, or are counted in ``removed``."""
    for entry, byte_range in block:
        try:
            sample = checked_sample(file.entry(*byte_range), source, number, entry)
        except BadSample as bad:
            if not skip:
                raise
            removed[bad.reason] += 1
            continue
        yield sample, conversation_parts(sample.turns, source.template), byte_range


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


def _check_image_folder(source: DataSource, number: int) -> None:
    if source.image_folder is not None and not Path(source.image_folder).is_dir():
        raise UserError(f"data.sources[{number}].image_folder: no such folder: {source.image_folder}")


def data_fingerprint(data: DataSection, tokenizer: SentencePieceTokenizer, vision_tokens: int) -> str:
    """sha256 over contents and settings, free of paths: a moved data set stays the same."""
    sources = [
        {**source.model_dump(exclude={"file", "image_folder"}), "sha256": JsonListFile(source.file).sha256()}
        for source in data.sources
    ]
    described = {
        "sources": sources,
        "tokenizer": tokenizer.fingerprint(),
        "vision_tokens": vision_tokens,
        "max_length": data.max_length,
        "on_bad_sample": data.on_bad_sample,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
