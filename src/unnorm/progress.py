"""How a long call tells what it is at."""

from collections.abc import Callable
from typing import Any

Watch = Callable[[dict[str, Any]], None]
"""Called with one row after another, each with its `kind`: a phase that begins, progress within it, metrics."""
