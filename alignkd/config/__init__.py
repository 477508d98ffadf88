"""The configuration of a run: schema, loading, presets. Nothing here imports torch."""

from alignkd.config.combinations import warnings_of
from alignkd.config.loading import dump_config, load_config, load_run_config
from alignkd.config.schema import Config

__all__ = ["Config", "dump_config", "load_config", "load_run_config", "warnings_of"]
