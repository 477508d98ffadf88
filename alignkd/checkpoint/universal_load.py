"""Load the universal format through DeepSpeed, around what DeepSpeed 0.19.8 gets wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alignkd.checkpoint.shard_files import shard_files
from alignkd.run_folder.checkpoints import read_manifest


def load_universal(engine: Any, folder: Path) -> None:
    """Load a conversion whose files have been verified. Frozen parameters and buffers stay as they are.
    Collective."""
    files = shard_files(engine)
    files.verified = frozenset(folder / name for name in read_manifest(folder)["files"])
    settings = [_settings(group) for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        with _stand_ins(engine.optimizer):
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        # A save while it is on may omit the model's weights.
        engine._config.load_universal_checkpoint = False
        files.verified = frozenset()
    # Stage 3 gives every group the settings of the first one ...
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    # ... and every parameter the same step counter, which AdamW would then advance once for each parameter.
    for parameter, state in engine.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            on_device = any(group.get("fused") for group in engine.optimizer.param_groups)
            state["step"] = state["step"].clone().to(parameter.device if on_device else "cpu")


class _StandIn:
    """A parameter for which there is nothing to load."""

    def __init__(self) -> None:
        self._hp_mapping = self

    def get_optim_state_keys(self) -> tuple[str, ...]:
        return ()

    def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> None:
        return None


@contextlib.contextmanager
def _stand_ins(optimizer: Any) -> Iterator[None]:
    """With many ranks, the last ranks' shards of a small parameter group are only padding. At stages 1 and 2
    DeepSpeed 0.19.8 fails there, which deadlocks the other ranks: it takes the step counter from the rank's
    first parameter of each group. So each group gets one."""
    load, stand_in = optimizer.load_hp_checkpoint_state_from_checkpoint_dir, _StandIn()

    def load_with_stand_ins(groups: str, folder: str) -> None:
        optimizer.groups_to_load = [
            [stand_in] if all(parameter._hp_mapping is None for parameter in group) else group
            for group in getattr(optimizer, groups)
        ]
        optimizer.param_names[stand_in] = "nothing"
        load("groups_to_load", folder)
        del optimizer.groups_to_load, optimizer.param_names[stand_in]

    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_with_stand_ins
    try:
        yield
    finally:
        del optimizer.load_hp_checkpoint_state_from_checkpoint_dir


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "step")}
