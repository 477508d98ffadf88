"""Lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print ``text`` as it is: no markup, no colours, and no wrapping, so that paths can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
