"""The monotone map that fits best, by pooling neighbours that are in the wrong order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def isotonic(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """
    The nearest sequence that never falls, by pooling neighbours that are in the wrong order.

    Args:
        values (sequence of `float`):
            Numbers.
        weights (sequence of `float`, *optional*):
            What each of them counts, above 0.

    Returns:
        `np.ndarray`: of all sequences that never fall the one with the least weighted squared distance.

    Example:

    ```python
    >>> isotonic([1, 3, 2, 4]).tolist()
    [1.0, 2.5, 2.5, 4.0]
    ```
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, np.ones(len(values)) if weights is None else weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, total, count = blocks.pop()
            both = total + block[1]
            block = ((mean * total + block[0] * block[1]) / both, both, count + block[2])
        blocks.append(block)
    return np.repeat([mean for mean, _, _ in blocks], [count for _, _, count in blocks])


def monotone_map(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    new: Sequence[float] | np.ndarray,
    *,
    rising: bool,
) -> np.ndarray:
    """
    Values at `new` of the monotone map that fits `x -> y` best: steps at the `x`, straight lines between them.

    Args:
        x, y (sequence of `float`):
            Paired numbers. Equal `x` get one value. Infinite `x` are the largest.
        new (sequence of `float`):
            Where the map is read. Outside the `x` it goes on at the height of the nearest.
        rising (`bool`):
            Whether it rises or falls.

    Returns:
        `np.ndarray` of the length of `new`.
    """
    x, y, new = (np.asarray(column, dtype=float) for column in (x, y, new))
    places, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=y) / counts
    heights = isotonic(means, counts) if rising else -isotonic(-means, counts)
    finite = np.isfinite(places)
    # An infinite resistance has no place on a line: between it and the largest finite one the map is a step.
    inner = np.interp(new, places[finite], heights[finite]) if finite.any() else np.full(len(new), heights[-1])
    return np.where(np.isinf(new), heights[-1], inner)
