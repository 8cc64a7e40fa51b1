"""Text shared by several tables."""

import math

from rich.text import Text

from unnorm.report.numbers import MOST_FIXED


def whole(lines: str) -> Text:
    """Paths and commands, never broken into lines however long, so that they can be copied."""
    return Text(lines, no_wrap=True, overflow="ignore")


def shown(value: float | None, form: str = ".4f") -> str:
    """A number in a form such as `+.4f`; three digits and a power of ten where a model went astray."""
    if value is None or not math.isfinite(value):  # None is how JSON has what is not finite.
        return "overflows"
    large = abs(value) >= MOST_FIXED and not form.endswith("%")
    return format(value, f"{form.partition('.')[0]}.3g" if large else form)


def mark(passed: bool) -> str:
    """The verdict on one check or class, as rich markup."""
    return "[green]passed[/]" if passed else "[bold red]FAILED[/]"


def verdict(failed: int, total: int, what: str) -> str:
    """Whether all `total` checks or classes passed, as rich markup."""
    return f"[bold red]{failed} of {total} {what} FAILED[/]" if failed else f"[green]all {total} {what} passed[/]"
