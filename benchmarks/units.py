"""Figures as people read them, for the report and its pictures."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def digits(value: float) -> str:
    """Three significant digits, and all of those before the point: 0.0123, 1.20, 1,234."""
    if value == 0:
        return "0"
    return f"{value:#.3g}" if abs(value) < 99.95 else f"{value:,.0f}"


def milliseconds(value: float) -> str:
    return f"{digits(value)} ms"


def quantity(value: float, unit: str) -> str:
    """With a prefix of 1000s: 32.1 GB/s for 3.21e10 B/s, 10.6M of what has no unit."""
    for size, prefix in _PREFIXES:
        if value >= 0.9995 * size:
            return f"{digits(value / size)}{' ' if unit else ''}{prefix}{unit}"
    return f"{digits(value)} {unit}".strip()


def round_quantity(value: float, unit: str) -> str:
    """At an axis: 30 GB/s, 10M."""
    for size, prefix in _PREFIXES:
        if value >= 0.9995 * size:
            return f"{value / size:g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:g} {unit}".strip()


def percent(part: float) -> str:
    """45%; with two significant digits below ten."""
    return f"{part:.0%}" if part >= 0.0995 else f"{100 * part:.2g}%"


def times(ratio: float) -> str:
    """2.20x."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{digits(ratio)}x"
