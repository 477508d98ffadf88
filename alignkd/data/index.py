"""The index of a run: every usable sample of all sources, as arrays.

Rank 0 builds it; an ``Index`` is picklable and holds no objects per sample.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.encoder import SampleEncoder
from alignkd.data.index_parts import (
    COLUMNS,
    TOO_LONG,
    IndexPart,
    PartSettings,
    index_part,
)
from alignkd.data.json_list import JsonListFile
from alignkd.data.processes import map_in_order
from alignkd.errors import UserError

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Progress = Callable[[int, int], None]  # bytes read so far, bytes of all files

ARRAYS = ("source", *COLUMNS)
TASK_BYTES = 256 << 10  # per task; what a task allocates fits into the processor's cache
PARALLEL_BYTES = 8 << 20  # less data is not worth the start of processes
MOST_PROCESSES = 32


class Task(NamedTuple):
    """Consecutive entries of a file, indexed by one process at a time."""

    source: int
    first: int  # number of the first entry
    ranges_E2: IntArray  # byte range of each entry


@dataclass(frozen=True)
class SourceReport:
    """How many entries of a source were kept, and why others were removed."""

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
    length: IntArray  # embedding tokens, V per image
    image_count: IntArray
    weights: tuple[float, ...]  # per source
    reports: tuple[SourceReport, ...]  # per source
    max_length: int
    fingerprint: str  # of everything that determines the samples and their encoding
    map_again: Callable[[], Index] | None = field(default=None, repr=False)  # if the arrays lie in a file

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Another process here maps the file, too: the arrays of millions of samples are not sent."""
        return super().__reduce__() if self.map_again is None else (self.map_again, ())

    def __len__(self) -> int:
        return len(self.source)

    def entries_hash(self) -> str:
        """sha256 of which entry of which source each sample is, in order."""
        arrays = np.stack([self.source, self.entry]).astype("<i8")
        return hashlib.sha256(arrays.tobytes()).hexdigest()

    def summary(self) -> str:
        """For the log: the number of samples, and how many were removed and why."""
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
    encoder: SampleEncoder,
    progress: Progress | None = None,
    hashes: Sequence[str] | None = None,
) -> Index:
    """Parse, check and measure all entries, using all cores if there are many. Raises UserError if an entry
    is bad (unless bad ones are skipped) or no sample is left. ``hashes``: sha256 of the files, if known."""
    for number, source in enumerate(data.sources):
        _check_image_folder(source, number)
    files = [JsonListFile(source.file) for source in data.sources]
    sizes = [len(file) for file in files]
    settings = [
        PartSettings(source, number, data.max_length, data.on_bad_sample == "skip")
        for number, source in enumerate(data.sources)
    ]
    work = partial(_index_task, files, settings, encoder)
    columns: list[IntArray] = []
    entries, removed = [0] * len(files), [Counter[str]() for _ in files]
    processes = len(os.sched_getaffinity(0)) if sum(sizes) > PARALLEL_BYTES else 1
    with closing(map_in_order(work, _tasks(files), min(processes, MOST_PROCESSES))) as results:
        for task, part in results:
            number = task.source
            columns.append(np.vstack([np.full((1, part.columns.shape[1]), number), part.columns]))
            entries[number] += len(task.ranges_E2)
            removed[number].update(part.removed)
            if progress is not None:
                progress(sum(sizes[:number]) + int(task.ranges_E2[-1, 1]), sum(sizes))
    if progress is not None:
        progress(sum(sizes), sum(sizes))

    joined = np.concatenate(columns, axis=1) if columns else np.empty((len(ARRAYS), 0), dtype=np.int64)
    arrays: dict[str, Any] = {name: np.ascontiguousarray(joined[row]) for row, name in enumerate(ARRAYS)}
    index = Index(
        **arrays,
        weights=tuple(source.weight for source in data.sources),
        reports=tuple(
            SourceReport(source.file, found, found - lost.total(), dict(lost))
            for source, found, lost in zip(data.sources, entries, removed, strict=True)
        ),
        max_length=data.max_length,
        fingerprint=data_fingerprint(data, encoder, hashes),
    )
    if len(index) == 0:
        raise UserError(f"no sample is left to train on:\n{index.summary()}")
    return index


def _index_task(
    files: Sequence[JsonListFile], settings: Sequence[PartSettings], encoder: SampleEncoder, task: Task
) -> tuple[Task, IndexPart]:
    number = task.source
    return task, index_part(files[number], task.first, task.ranges_E2, settings[number], encoder)


def _tasks(files: Sequence[JsonListFile]) -> Iterator[Task]:
    """All entries of all files, in tasks of about :data:`TASK_BYTES`."""
    for source, file in enumerate(files):
        first, ranges = 0, list[tuple[int, int]]()
        for start, stop in file.ranges():
            ranges.append((start, stop))
            if stop - ranges[0][0] >= TASK_BYTES:
                yield Task(source, first, np.array(ranges))
                first, ranges = first + len(ranges), []
        if ranges:
            yield Task(source, first, np.array(ranges))


def _check_image_folder(source: DataSource, number: int) -> None:
    if source.image_folder is not None and not Path(source.image_folder).is_dir():
        raise UserError(f"data.sources[{number}].image_folder: no such folder: {source.image_folder}")


def data_fingerprint(
    data: DataSection,
    encoder: SampleEncoder,
    hashes: Sequence[str] | None = None,
) -> str:
    """sha256 over contents and settings, without paths: a data set that was moved stays the same."""
    if hashes is None:
        hashes = [JsonListFile(source.file).sha256() for source in data.sources]
    sources = [
        {**_described(source), "sha256": sha256} for source, sha256 in zip(data.sources, hashes, strict=True)
    ]
    described = {
        "sources": sources,
        **encoder.fingerprint(),
        "max_length": data.max_length,
        "on_bad_sample": data.on_bad_sample,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _described(source: DataSource) -> dict[str, Any]:
    """Without paths, and without options that are not set, so that data stay the same when a release brings
    new options."""
    unset = {"image_options"} if not source.image_options else set()
    return source.model_dump(exclude={"file", "image_folder", *unset})
