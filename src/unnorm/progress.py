"""Progress reports of long calls."""

from collections.abc import Callable
from typing import Any

Watch = Callable[[dict[str, Any]], None]
"""Called with one row at a time, each with a `kind`: the start of a phase, progress within it, or metrics."""


def silent(row: dict[str, Any], /) -> None:
    """A watch that does nothing."""


def say(watch: Watch, text: str, tokens: int | None = None) -> None:
    """Announce a phase, and the number of tokens it will take if known."""
    watch({"kind": "phase", "text": text, "tokens": tokens})
