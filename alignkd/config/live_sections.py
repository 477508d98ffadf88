"""Sections of what is reported while a run trains. Nothing in them changes what is learnt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignkd.config.section import PositiveInt, Section

# W&B refuses these characters in the name of a project.
ProjectName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f/\\#?%:]+$")]


class LoggingSection(Section):
    gradient_norms_every: PositiveInt | None = Field(
        None,
        description="steps between samples of each loss term's gradient norm; a sample takes a teacher "
        "forward and a forward and backward per term, of one micro-batch; null: never",
    )


class WandbSection(Section):
    project: ProjectName = Field(description="project on Weights & Biases")
    mode: Literal["online", "offline"] = Field(
        "online",
        description="`offline` writes files in the run folder, for `wandb sync`; `online` needs the network",
    )


class TrackingSection(Section):
    tensorboard: bool = Field(False, description="write TensorBoard's event files to tracking/tensorboard")
    wandb: WandbSection | None = Field(None, description="log to Weights & Biases")
