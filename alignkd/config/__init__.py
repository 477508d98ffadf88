"""The configuration: schema, loading, checks. Names are loaded when they are first used.

pydantic and the schema take a tenth of a second, and many readers of a run folder need only a small module
beside this one. Nothing here imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkd.config.loading import dump_config, load_config, load_run_config
    from alignkd.config.no_effect import warnings_of
    from alignkd.config.schema import Config

_MODULES = {
    "Config": "schema",
    "dump_config": "loading",
    "load_config": "loading",
    "load_run_config": "loading",
    "warnings_of": "no_effect",
}

__all__ = ["Config", "dump_config", "load_config", "load_run_config", "warnings_of"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
