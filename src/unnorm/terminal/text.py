"""Text shared by several tables."""

import math

from rich.text import Text

from unnorm.report.numbers import MOST_FIXED


def whole(lines: str) -> Text:
    """Paths and commands, never broken into lines however long, so that they can be copied."""
    return Text(lines, no_wrap=True, overflow="ignore")


def fixed(value: float | None, sign: str = "") -> str:
    """Four decimals; three digits and a power of ten where a model went astray. `sign` is `+` to show it always."""
    if value is None or not math.isfinite(value):  # None is how JSON has what is not finite.
        return "overflows"
    return f"{value:{sign}{'.4f' if abs(value) < MOST_FIXED else '.3g'}}"


def mark(passed: bool) -> str:
    """The verdict on one check or class, as rich markup."""
    return "[green]passed[/]" if passed else "[bold red]FAILED[/]"


def verdict(failed: int, total: int, what: str) -> str:
    """Whether all `total` checks or classes passed, as rich markup."""
    return f"[bold red]{failed} of {total} {what} FAILED[/]" if failed else f"[green]all {total} {what} passed[/]"
