"""Numbers about a ranking of rows: whom it puts first, and what it goes along with. Ties are shared evenly."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """
    Ranks from 1; equal values share the mean of theirs.

    Args:
        values (`np.ndarray` of shape `(n,)`):
            Numbers.

    Returns:
        `np.ndarray` of shape `(n,)`, float64.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """
    Spearman's rank correlation, with average ranks for ties.

    Args:
        x, y (`np.ndarray` of shape `(n,)`):
            Numbers, paired.

    Returns:
        `float`, or `None` where one of both does not vary.

    Example:

    ```python
    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 6.0]))
    0.5
    ```
    """
    if len(x) < 2:
        return None
    x, y = ranks(x), ranks(y)
    # Ranks are multiples of 1/2 around a known mean: a column that does not vary has a spread of exactly 0.
    x, y = x - (len(x) + 1) / 2, y - (len(y) + 1) / 2
    size = (x @ x) * (y @ y)
    return float(np.clip(x @ y / np.sqrt(size), -1, 1)) if size > 0 else None


def auroc(scores: np.ndarray, labelled: np.ndarray) -> float | None:
    """
    Chance that a row without the label outranks one with it; a tie counts half (Mann and Whitney's statistic).

    Args:
        scores (`np.ndarray` of shape `(n,)`):
            The higher, the sooner a row is kept.
        labelled (`np.ndarray` of shape `(n,)`, bool):
            Rows that had better not be kept.

    Returns:
        `float`, or `None` where all rows have the label or none has.
    """
    unlabelled = ~labelled
    first, second = int(unlabelled.sum()), int(labelled.sum())
    if not first or not second:
        return None
    return float((ranks(scores)[unlabelled].sum() - first * (first + 1) / 2) / (first * second))


def precision_at(scores: np.ndarray, labelled: np.ndarray, k: int) -> float | None:
    """
    Share of rows without the label among the `k` with the highest scores. Of rows that tie for the last places each
    counts in part, as if they had been drawn by lot, so that the order of the rows does not matter.

    Args:
        scores (`np.ndarray` of shape `(n,)`):
            The higher, the sooner a row is kept.
        labelled (`np.ndarray` of shape `(n,)`, bool):
            Rows that had better not be kept.
        k (`int`):
            Number of rows, at most n.

    Returns:
        `float`, or `None` for `k` 0.
    """
    if k == 0:
        return None
    last = np.sort(scores)[-k]
    above, tied = scores > last, scores == last
    part = (k - above.sum()) / tied.sum()
    return float(((~labelled & above).sum() + part * (~labelled & tied).sum()) / k)


def jaccard(first: Collection[int], second: Collection[int]) -> float | None:
    """
    Rows in both sets, of those in at least one.

    Args:
        first, second (`Collection[int]`):
            Row numbers.

    Returns:
        `float`, or `None` where both are empty.
    """
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one or other else None


def effective_fraction(weights: np.ndarray) -> float | None:
    """
    Share of the rows that the weights amount to: `(sum w)^2 / (n sum w^2)`, 1 where all are equal, 1/n where one has
    everything.

    Args:
        weights (`np.ndarray` of shape `(n,)`):
            None negative.

    Returns:
        `float`, or `None` where there is no weight at all.
    """
    largest = weights.max(initial=0.0)
    if largest <= 0:
        return None
    weights = weights / largest  # squares of small weights would vanish
    return float(weights.sum() ** 2 / (len(weights) * (weights @ weights)))
