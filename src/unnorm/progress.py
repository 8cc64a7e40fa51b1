"""How a long call tells what it is at."""

from collections.abc import Callable
from typing import Any

Watch = Callable[[dict[str, Any]], None]
"""Called with one row after another, each with its `kind`: a phase that begins, progress within it, metrics."""


def silent(row: dict[str, Any], /) -> None:
    """The watch of a call that nobody watches."""


def say(watch: Watch, text: str, tokens: int | None = None) -> None:
    """Announce a phase, and the tokens that it will take where that is known."""
    watch({"kind": "phase", "text": text, "tokens": tokens})
