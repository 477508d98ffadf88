"""The index of a run, kept in its folder: lengths are computed once, not at every start."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from alignkd.config.schema import DataSection
from alignkd.data.index import ARRAYS, Index, Progress, SourceReport, build_index, data_fingerprint
from alignkd.data.tokenizer import SentencePieceTokenizer


def cached_index(
    path: Path,
    data: DataSection,
    tokenizer: SentencePieceTokenizer,
    vision_tokens: int,
    progress: Progress | None = None,
) -> Index:
    """The index in ``path`` if it belongs to these data and settings (their contents are hashed), else a new
    one, which is written there. A damaged file counts as none; one that cannot be written is no error."""
    fingerprint = data_fingerprint(data, tokenizer, vision_tokens)
    index = _read(path)
    if index is not None and index.fingerprint == fingerprint:
        return index
    index = build_index(data, tokenizer, vision_tokens, progress)
    try:
        _write(path, index)
    except OSError:
        path.unlink(missing_ok=True)
    return index


def _write(path: Path, index: Index) -> None:
    facts = {
        "weights": index.weights,
        "reports": [asdict(report) for report in index.reports],
        "max_length": index.max_length,
        "fingerprint": index.fingerprint,
    }
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **{name: getattr(index, name) for name in ARRAYS})
    temporary.replace(path)


def _read(path: Path) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            return Index(
                **{name: stored[name] for name in ARRAYS},
                weights=tuple(facts["weights"]),
                reports=tuple(SourceReport(**report) for report in facts["reports"]),
                max_length=facts["max_length"],
                fingerprint=facts["fingerprint"],
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
