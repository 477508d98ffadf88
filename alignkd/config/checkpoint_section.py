"""The section ``checkpoint``."""

from __future__ import annotations

from pydantic import Field

from alignkd.config.section import PositiveInt, Section


class CheckpointSection(Section):
    every: PositiveInt = Field(500, description="optimizer steps between checkpoints")
    keep_last: PositiveInt | None = Field(
        3, description="number of latest checkpoints to keep; null keeps all"
    )
    keep_every: PositiveInt | None = Field(
        None, description="also keep checkpoints at multiples of this many steps"
    )
    max_failures: PositiveInt = Field(3, description="consecutive failed saves that stop the run")
    asynchronous: bool = Field(
        True,
        description="continue training while files are written from a copy in host memory, which takes as "
        "much memory as the rank's files; training waits if there is not enough, or if false",
    )
