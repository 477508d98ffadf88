"""A run on Weights & Biases. Its key is W&B's own affair (WANDB_API_KEY, ~/.netrc): it is never read here."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import wandb

from alignkd.config.live_sections import WandbSection
from alignkd.config.schema import Config
from alignkd.tracking.follow import TrackerState


class WandbRun:
    """All attempts of a run are one W&B run, whose id is kept in the run folder."""

    def __init__(self, state: TrackerState, section: WandbSection, config: Config) -> None:
        """Raises what W&B raises: without a key, or without a network in online mode."""
        if "id" not in state.values:
            state.save(id=uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=section.project,
            name=config.run.name,
            id=state.values["id"],
            resume="allow",
            mode=section.mode,
            dir=str(state.folder),
            config=config.model_dump(mode="json", exclude={"stages", "slurm"}),
            settings=wandb.Settings(
                silent=True,
                console="off",  # the rank's log stays in the run folder
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
            ),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B's own process writes and sends rows in its own time."""

    def close(self) -> None:
        self._run.finish()
