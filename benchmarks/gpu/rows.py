"""Rows of results, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import report

Row = dict[str, Any]  # column -> text, number, truth or None; the first column says what was measured


def table(rows: Sequence[Row]) -> str:
    """Markdown; the columns of all rows, in the order in which they first appear."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return report.table(columns, [[shown(row.get(column)) for column in columns] for row in rows])


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
