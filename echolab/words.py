"""Numbers as people read them in a sentence: 62 %, 1.2 M tokens, 1,234 groups."""

from __future__ import annotations

import math

THIN = "\u202f"  # a narrow space that does not break, between a number and its unit


def percent(share: float | None) -> str:
    """A share in whole percent; never 0 % or 100 % unless it is."""
    if share is None:
        return "unknown"
    if 0 < share < 0.005:
        return f"under 1{THIN}%"
    if 0.995 <= share < 1:
        return f"over 99{THIN}%"
    return f"{math.floor(share * 100 + 0.5)}{THIN}%"


def short(number: float | None) -> str:
    """Two or three digits and a letter for the thousands: 950, 1.2 k, 34 M."""
    if number is None:
        return "unknown"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.1f}{THIN}{letter}" if abs(scaled) < 9.95 else f"{scaled:.0f}{THIN}{letter}"
    return f"{number:.0f}"


def count(n: int, what: str) -> str:
    """`1 group`, `1,234 groups`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
