"""Figures as people read them: decimal multiples of a unit, and a dash for what does not exist.

Knows numbers and prefixes; knows no report.
"""

from typing import Final

NONE: Final = "-"

_PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E")


def scale(value: float) -> tuple[float, str]:
    """The divisor and the decimal prefix with which a figure reads below 1000: M is 10^6."""
    power = 0
    while round(value / 1000**power, 2) >= 1000 and power < len(_PREFIXES) - 1:
        power += 1
    return 1000**power, _PREFIXES[power]


def scaled(value: float | None, unit: str) -> str:
    """A decimal multiple of the unit with two digits: MB is 10^6 bytes."""
    if value is None:
        return NONE
    divisor, prefix = scale(value)
    return f"{value / divisor:,.{2 if prefix else 0}f} {prefix}{unit}"


def size(value: float | None) -> str:
    """Bytes, such as "170.20 MB"."""
    return scaled(value, "B")


def rounded(value: float | None, unit: str) -> str:
    """A decimal multiple of the unit to three digits, for narrow columns."""
    if value is None:
        return NONE
    divisor, prefix = scale(value)
    figure = value / divisor
    digits = 0 if not prefix or figure >= 100 else 1 if figure >= 10 else 2
    return f"{figure:,.{digits}f} {prefix}{unit}".rstrip()
