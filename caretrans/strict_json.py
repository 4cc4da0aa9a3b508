"""JSON that every reader accepts: Python alone writes and reads NaN and Infinity."""
import json
import math
from typing import Any

from .errors import ResultsError

__all__ = ['replace_non_finite', 'to_json']


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` of a value whose numbers are all finite.

    Raises:
        ResultsError: One is not; the message says where it is.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        where = _find_non_finite(value)
        if where is None:
            raise
        raise ResultsError(f'{where[0].lstrip(".")} is {where[1]}, which JSON cannot hold.') from None


def replace_non_finite(value: Any) -> Any:
    """A copy with None instead of numbers that are not finite, for results that took long to measure."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    return [replace_non_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _find_non_finite(value: Any, path: str = '') -> tuple[str, float] | None:
    """Path and value of the first number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return path or 'the result', value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        found = _find_non_finite(item, f'{path}.{key}')
        if found:
            return found
    return None
