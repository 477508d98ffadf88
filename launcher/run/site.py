"""The site profile: Slurm settings for every run on a cluster, in ``~/.config/alignkd/site.yaml``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignkd.config.dotted import did_you_mean
from alignkd.config.slurm_section import SlurmSection
from alignkd.config.yaml_reader import read_yaml
from alignkd.errors import ConfigError


def site_path(environment: Mapping[str, str]) -> Path:
    home = environment.get("XDG_CONFIG_HOME") or str(
        Path(environment.get("HOME", "~")).expanduser() / ".config"
    )
    return Path(home) / "alignkd" / "site.yaml"


def read_site(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """``{"slurm": {...}}``, or {} without a profile. Every configuration file overrides it.

    Raises ConfigError with all problems of the profile.
    """
    path = site_path(environment)
    if not path.is_file():
        return {}
    document = read_yaml(path)
    if document is None:
        return {}
    if not isinstance(document, dict) or set(document) != {"slurm"}:
        raise ConfigError(str(path), ["a site profile has one section: `slurm: {partition: ..., ...}`"])
    try:
        SlurmSection.model_validate(document["slurm"])
    except ValidationError as error:
        valid = ", ".join(SlurmSection.model_fields)
        problems = []
        for details in error.errors(include_url=False):
            key = ".".join(str(part) for part in ("slurm", *details["loc"]))
            unknown = details["type"] == "extra_forbidden"
            meant = did_you_mean(str(details["loc"][-1]), SlurmSection.model_fields)
            unknown_text = f"{key}: unknown key{meant or f'; valid: {valid}'}"
            problems.append(unknown_text if unknown else f"{key}: {details['msg']}")
        raise ConfigError(str(path), problems) from None
    return document
