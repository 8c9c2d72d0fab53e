"""Values of a decoded `results.json`: read strictly, missing ones left out."""

from __future__ import annotations

import math
from collections.abc import Mapping

Interval = tuple[float, float]


def interval_of(value: object, where: str) -> Interval | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where}: interval is {value!r}; it must be [low, high] or null.")
    low, high = (number_of(bound, f"{where}: interval") for bound in value)
    return None if low is None or high is None else (low, high)


def number_of(value: object, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}; it must be a number or null.")
    return float(value) if math.isfinite(value) else None


def count_of(value: object, where: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{where} is {value!r}; it must be a whole number from 0 up.")
    return value


def mapping_of(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def text_of(value: object) -> str:
    return "" if value is None else str(value)


def describe(value: object) -> str:
    """Any JSON value in a line of text: `steps=16, radius=1.5`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={describe(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(describe(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
