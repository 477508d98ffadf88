"""Numbers as the page writes them."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"
_Z95 = 1.96  # standard errors in half a 95 % interval


def short(value: float) -> str:
    """Three digits, thousands and more with k, M, G: ``0.0979``, ``12.3k``."""
    size = abs(value)
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            divisor = 1e3 if letter == "k" else factor
            return _plain(value / divisor) + letter
    return _plain(value)


def _plain(value: float) -> str:
    text = f"{value:.3g}"
    if abs(value) >= 1000:
        text = f"{value:.0f}"
    return text.replace("e-0", "e-").replace("-", MINUS)


def signed(value: float, decimals: int = 1) -> str:
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def percent(share: float) -> str:
    """``97 %``, ``0.03 %``; what is there never shows as 0."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return "< 0.01 %"
    return f"{value:.0f} %" if abs(value) >= 1 or value == 0 else f"{value:.2g} %"


def half_interval(standard_error: float) -> float:
    """Half the width of the 95 % interval."""
    return _Z95 * standard_error
