"""Find DeepSpeed files and Slurm templates: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource_folder(name: str) -> Path:
    """The folder ``ds_configs`` or ``slurm``. An installed copy comes first: a wheel has no checkout."""
    for folder in (_PACKAGE / "_installed" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{name}: neither in {_PACKAGE / '_installed'} nor in {_PACKAGE.parent}: broken installation"
    )


def source_checkout(package: Path = _PACKAGE) -> Path | None:
    """The folder of the source checkout that ``package`` runs from; None for an installed copy, whose folder
    holds the packages of one interpreter and must not come before those of another."""
    return package.parent if (package.parent / "pyproject.toml").is_file() else None
