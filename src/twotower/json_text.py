"""JSON of data that leave the program. It has no NaN and no infinity, which JSON lacks: they become null."""

from __future__ import annotations

import json
import math
from typing import Any

JsonObject = dict[str, Any]  # also keyword arguments of transformers, of many types


def to_json(value: object, *, ensure_ascii: bool = True) -> str:
    """The JSON of a value."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: object) -> object:
    """The value with None for every float that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
