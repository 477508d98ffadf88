"""Reads what W&B writes in offline mode: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


def history(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every row in all offline runs below ``folder``, in the order of their names."""
    rows = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for content in _records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {item.nested_key[0] or item.key: item.value_json for item in record.history.item}
                values = {name: json.loads(value) for name, value in items.items()}
                rows.append((record.history.step.num, values))
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, b""
    while position + _CHUNK_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _CHUNK_HEADER
        parts += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
