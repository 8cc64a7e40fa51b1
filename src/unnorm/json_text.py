"""Results as JSON that any parser reads: numbers that are not finite become null."""

import hashlib
import json
import math
from typing import Any


def json_text(values: Any) -> str:
    """Indented JSON; Python's own would write NaN and Infinity, which JSON does not have."""
    return json.dumps(finite(values), indent=2, allow_nan=False)


def digest(values: Any) -> str:
    """SHA-256 of values, the same whatever the order of their keys; what JSON does not have counts as text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def finite(values: Any) -> Any:
    """The same values, with None in place of numbers that are not finite."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
