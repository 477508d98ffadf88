"""Sections of what is reported while a run trains. Nothing in them changes what is learnt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkd.config.section import Section

# W&B refuses these characters in the name of a project.
ProjectName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f/\\#?%:]+$")]


class WandbSection(Section):
    project: ProjectName = Field(description="project on Weights & Biases")
    mode: Literal["online", "offline"] = Field(
        "online",
        description="`offline` writes files in the run folder, for `wandb sync`; `online` needs the network",
    )


class TrackingSection(Section):
    tensorboard: bool = Field(False, description="write TensorBoard's event files to tracking/tensorboard")
    wandb: WandbSection | None = Field(None, description="log to Weights & Biases")
