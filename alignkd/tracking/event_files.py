"""TensorBoard's event files, written by its own package, which does not need TensorFlow or torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class EventFiles:
    """One attempt's file. TensorBoard drops what earlier files hold of steps after ``last_step``."""

    def __init__(self, folder: Path, last_step: int) -> None:
        """Raises OSError."""
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=last_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=numbers)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
