"""Which packages the configured trackers need. Imports none of them."""

from __future__ import annotations

import importlib.util

from alignkd.config.live_sections import TrackingSection


def trackers_of(tracking: TrackingSection) -> list[str]:
    """The trackers that are on; each is the name of its key and of its package."""
    chosen = {"tensorboard": tracking.tensorboard, "wandb": tracking.wandb is not None}
    return [name for name, is_on in chosen.items() if is_on]


def missing_packages(tracking: TrackingSection) -> list[str]:
    """One line for each tracker whose package is not installed."""
    return [
        f"tracking.{name} needs the package {name}: pip install 'alignkd[trackers]'"
        for name in trackers_of(tracking)
        if not _is_installed(name)
    ]


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # W&B makes folders of its own name, and Python takes any folder for a package without a file.
    return spec is not None and spec.origin is not None
