"""Scores of cases over wordings as arrays, and bootstrap intervals over cases."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000

Matrix = Sequence[Sequence[float | None]] | np.ndarray
"""Cases x wordings, wording 0 the original. `None` or NaN is a wording without a score."""

Scale = tuple[float, float]
Interval = list[float]


def as_rows(matrix: Matrix) -> list[np.ndarray]:
    """
    A matrix of scores as one float array a case, NaN where there is no score.

    Args:
        matrix:
            As in [`~trl_robust.evaluation.prompt_robustness`].

    Returns:
        `list` of `np.ndarray`.

    Raises:
        `ValueError`: no cases, what is not a number, or an infinite score.
    """
    if len(matrix) == 0:
        raise ValueError("The matrix has no cases; give at least one row of scores.")
    return [as_row(row, number) for number, row in enumerate(matrix)]


def as_row(row: Sequence[float | None] | np.ndarray, number: int) -> np.ndarray:
    """
    Scores as a float array, NaN where there is none.

    Args:
        row (`Sequence[float]`):
            Scores, `None` or NaN where there is none.
        number (`int`):
            What messages call the row.

    Returns:
        `np.ndarray`.

    Raises:
        `ValueError`: what is not a number, or an infinite score.
    """
    if isinstance(row, str) or not hasattr(row, "__len__"):
        raise ValueError(f"Row {number} is {row!r}; it must be a sequence of scores, one a wording.")
    try:
        values = np.array([np.nan if value is None else value for value in row], dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Row {number} holds what is no number ({error}). Use None where there is no score."
        ) from error
    if values.ndim != 1:
        raise ValueError(f"Row {number} holds lists; it must hold one score a wording.")
    if np.isinf(values).any():
        raise ValueError(f"Row {number} holds an infinite score, which has no mean. Use None where there is no score.")
    return values


def case_intervals(
    values: np.ndarray,
    scales: Sequence[Scale | None],
    *,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval | None]:
    """
    Percentile bootstrap intervals of the means of several columns, all from the same resampled cases.

    Args:
        values (`np.ndarray` of shape `(cases, measures)`):
            Measures of each case.
        scales (sequence of `tuple`):
            Lowest and highest value of each measure, or `None`; see [`~trl_robust.evaluation.prompt_robustness`].
        confidence, num_resamples, seed (*optional*):
            As in [`~trl_robust.evaluation.prompt_robustness`].

    Returns:
        `list`: `[low, high]` for each measure; `None` with fewer than two cases, or where all cases agree and the
        measure has no scale.
    """
    n = len(values)
    if n == 0:
        return [None] * values.shape[1]
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, size := max(1, 2_000_000 // n)):  # in parts, so that memory stays small
        draws = generator.multinomial(n, np.full(n, 1 / n), size=min(size, num_resamples - start))
        means.append(draws @ values / n)
    tail = (1 - confidence) / 2
    bounds = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    unseen = z**2 / (n + z**2)
    found: list[Interval | None] = []
    for column, scale in enumerate(scales):
        own = values[:, column]
        if np.ptp(own) >= 1e-9:
            found.append([float(bounds[0, column]), float(bounds[1, column])])
        elif scale is None or n < 2:
            found.append(None)
        else:
            mean = min(max(float(own[0]), scale[0]), scale[1])
            found.append([mean + unseen * (end - mean) for end in scale])
    return found


def check_settings(confidence: float, num_resamples: int, scale: Scale | None = None) -> None:
    """
    Refuses settings of [`case_intervals`] that make no interval.

    Args:
        confidence, num_resamples, scale:
            As in [`~trl_robust.evaluation.prompt_robustness`].

    Raises:
        `ValueError`: one of them is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, for example 0.95.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1; {RESAMPLES} is the default.")
    if scale is not None and not (scale[0] < scale[1] and not any(map(isinf, scale))):
        raise ValueError(f"scale={scale} must be the lowest and the highest score, such as (0, 1).")
