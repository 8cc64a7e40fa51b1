"""Results as JSON that any parser reads: numbers that are not finite become null."""

import json
import math
from typing import Any


def json_text(values: Any) -> str:
    """Indented JSON; Python's own would write NaN and Infinity, which JSON does not have."""
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
