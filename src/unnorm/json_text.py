"""Results as JSON that any parser can read: non-finite numbers become null."""

import hashlib
import json
import math
from typing import Any


def json_text(values: Any) -> str:
    """Indented JSON without NaN and Infinity, which Python's json would write but JSON does not have."""
    return json.dumps(finite(values), indent=2, allow_nan=False)


def digest(values: Any) -> str:
    """SHA-256 of values, independent of key order; values that JSON can't represent are hashed as text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def finite(values: Any) -> Any:
    """The same values, with None in place of non-finite numbers."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
