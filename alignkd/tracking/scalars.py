"""The numbers of a metrics row, in groups that trackers show together."""

from __future__ import annotations

from alignkd.run_folder.metrics import Row

GROUPS = ("evaluation", "gradient_norm_of")  # columns NAME_x become NAME/x; all others train/x


def scalars(row: Row) -> dict[str, float]:
    """Everything but the step itself, and what is no number (null: not finite)."""
    return {
        _tag(name): float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _tag(column: str) -> str:
    for group in GROUPS:
        if column.startswith(f"{group}_"):
            return f"{group}/{column.removeprefix(f'{group}_')}"
    return f"train/{column}"
