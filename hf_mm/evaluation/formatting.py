"""How figures are printed wherever they are."""

from __future__ import annotations


def format_percent(value: float | None) -> str:
    """A percentage with one digit, with two below 1; a dash where there is no answer."""
    if value is None:
        return "–"
    return f"{value:.2f}" if 0 < value < 1 else f"{value:.1f}"
