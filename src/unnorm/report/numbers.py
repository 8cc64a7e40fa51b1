"""Numbers formatted for readers; missing ones become a dash."""

import math
from collections.abc import Mapping
from typing import Any

MISSING = "—"
MOST_FIXED = 10_000
"""Values from here on are written in powers of ten."""


def finite_or_none(value: Any) -> float | None:
    """The value as a float; None if it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def loss_increase(result: Mapping[str, Any]) -> float | None:
    """The twin's loss minus the original's, in nats per token; None where one of them is missing or not finite."""
    teacher, lnfree = finite_or_none(result.get("teacher_loss")), finite_or_none(result.get("lnfree_loss"))
    return None if teacher is None or lnfree is None else lnfree - teacher


def fixed(value: Any, digits: int = 4, sign: bool = False) -> str:
    """With `digits` decimals: a loss, a gap. From 10,000 on, as of a model that went astray, in powers of ten."""
    number = finite_or_none(value)
    if number is None:
        return MISSING
    form = f".{digits}f" if abs(number) < MOST_FIXED else ".2e"
    return _minus(_tidy_exponent(f"{number:{'+' if sign else ''}{form}}"))


def significant(value: Any, digits: int = 3) -> str:
    """With `digits` significant digits; in scientific notation below 0.0001 and from 100000."""
    number = finite_or_none(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    if not 1e-4 <= abs(number) < 1e5:
        return _minus(_tidy_exponent(f"{number:.{digits - 1}e}"))
    return _minus(f"{number:.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}")


def shortest(value: Any, digits: int = 3) -> str:
    """With up to `digits` significant digits and no trailing zeros: limits, settings."""
    number = finite_or_none(value)
    return MISSING if number is None else _minus(_tidy_exponent(f"{number:.{digits}g}"))


def percent(value: Any) -> str:
    """A fraction as a percentage."""
    number = finite_or_none(value)
    return MISSING if number is None else f"{100 * number:.1f}%"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands: a comma could be taken for a decimal point."""
    number = finite_or_none(value)
    return MISSING if number is None else f"{round(number):,}".replace(",", "\u202f")


def short_count(value: Any) -> str:
    """A number of tokens as the command line takes it: 500k, 2M, 1.5B."""
    number = finite_or_none(value)
    if number is None:
        return MISSING
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # What would round up to 1000 of one unit is shown as 1 of the next.
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def duration(value: Any) -> str:
    """Seconds up to two minutes, then minutes or hours."""
    seconds = finite_or_none(value)
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.0f} seconds" if seconds >= 9.5 else f"{seconds:.1f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def interval(value: Any, places: int = 4) -> str:
    """A confidence interval, low to high."""
    ends = list(value) if isinstance(value, list | tuple) else []
    return f"{fixed(ends[0], places)} to {fixed(ends[1], places)}" if len(ends) == 2 else MISSING


def _minus(text: str) -> str:
    # A leading hyphen becomes a minus sign; exponents keep the hyphen, so that they can be copied as numbers.
    return f"\u2212{text[1:]}" if text.startswith("-") else text


def _tidy_exponent(text: str) -> str:
    """Turn 2.3e-06 into 2.3e-6."""
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text
