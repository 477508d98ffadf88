"""The base class and the field types of all configuration sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0)]
PositiveRate = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
# Without control characters: paths end up in scripts, logs and `#SBATCH` lines.
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Section(BaseModel):
    """Rejects unknown keys and implicit conversions. Its validator is built when it is first needed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)
