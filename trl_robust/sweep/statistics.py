"""Means over requests and seeds with their bootstrap intervals, alone and as paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from ..evaluation import attack_success, paired_difference

RESAMPLES = 2000
CONFIDENCE = 0.95

Scores = Mapping[int, Mapping[str, float]]
"""Seed -> request -> score in [0, 1]."""


class Estimate(TypedDict):
    """A mean and where it may lie."""

    value: float | None
    interval: list[float] | None
    seeds: int
    rows: int


def mean_of(scores: Scores) -> Estimate:
    """
    Mean over requests and seeds, with a percentile bootstrap interval over both.

    Args:
        scores ([`Scores`]):
            What was scored.

    Returns:
        [`Estimate`].
    """
    return _estimate(scores, (0.0, 1.0))


def difference_of(scores: Scores, baseline: Scores) -> Estimate:
    """
    Mean difference to a baseline over the requests that both were scored on with the same seed.

    A hard request is hard for both, and both saw the same rows in the same order; only what differs is resampled.

    Args:
        scores ([`Scores`]):
            Of a cell.
        baseline ([`Scores`]):
            Of the baseline.

    Returns:
        [`Estimate`]: above 0 where the cell scores higher.
    """
    paired = {
        seed: {row: score - baseline[seed][row] for row, score in rows.items() if row in baseline[seed]}
        for seed, rows in scores.items()
        if seed in baseline
    }
    return _estimate({seed: rows for seed, rows in paired.items() if rows}, (-1.0, 1.0))


def product_of(first: Scores, second: Scores) -> Estimate:
    """
    Product of two means over the same seeds, with its interval.

    Args:
        first, second ([`Scores`]):
            What was scored.

    Returns:
        [`Estimate`]. Where one of the means has no spread, the interval is the product of both intervals, which is
        a little wide.
    """
    parts = [_estimate(scores, (0.0, 1.0)) for scores in (first, second)]
    values = [part["value"] for part in parts]
    found = Estimate(value=None, interval=None, seeds=len(first), rows=sum(part["rows"] for part in parts))
    if values[0] is None or values[1] is None:
        return found
    found["value"] = values[0] * values[1]
    draws = [_resampled(scores) for scores in (first, second)]
    if all(np.ptp(draw) > 0 for draw in draws):
        found["interval"] = _percentiles(draws[0] * draws[1])
    elif (low := parts[0]["interval"]) and (high := parts[1]["interval"]):
        found["interval"] = [a * b for a, b in zip(low, high, strict=True)]
    return found


def _estimate(scores: Scores, scale: tuple[float, float]) -> Estimate:
    values = [score for rows in scores.values() for score in rows.values()]
    found = Estimate(value=None, interval=None, seeds=len(scores), rows=len(values))
    if not values:
        return found
    found["value"] = float(np.mean(values))
    rows = {row for own in scores.values() for row in own}
    if max(values) - min(values) >= 1e-9:
        found["interval"] = _percentiles(_resampled(scores))
    elif len(rows) > 1:
        found["interval"] = _without_spread(values[0], len(rows), scale)
    return found


def _resampled(scores: Scores) -> np.ndarray:
    """
    Means of resamples: requests and seeds drawn with replacement, the same requests for all seeds of a draw.

    That is right where seeds share their requests, as on a real model, and where they do not: requests of different
    seeds that have a number in common are then independent, and drawing them together changes nothing. The draws are
    the same for the same seeds and number of requests, so that what is multiplied is drawn together.
    """
    rows = sorted({row for own in scores.values() for row in own})
    values = np.array([[own.get(row, np.nan) for row in rows] for own in scores.values()])
    there = ~np.isnan(values)
    drawn = _counts(0, len(scores)), _counts(1, len(rows))
    totals = np.einsum("rs,sn,rn->r", drawn[0], np.where(there, values, 0.0), drawn[1])
    sizes = np.einsum("rs,sn,rn->r", drawn[0], there.astype(float), drawn[1])
    return totals / np.maximum(sizes, 1e-12)


def _percentiles(draws: np.ndarray) -> list[float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return [float(low), float(high)]


def _counts(seed: int, size: int) -> np.ndarray:
    """How often each of `size` things comes up in each resample."""
    return np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(float)


def _without_spread(value: float, num_rows: int, scale: tuple[float, float]) -> list[float] | None:
    """The interval where every score is the same and there is no spread to resample: Wilson's, over the requests."""
    if scale[0] == 0.0:
        return attack_success([value] * num_rows)["interval"]
    before = [{"id": row, "success": max(0.0, -value)} for row in range(num_rows)]
    after = [{"id": row, "success": max(0.0, value)} for row in range(num_rows)]
    return paired_difference(before, after)["interval"]


def scores_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    Scores by request, of rows as a judge leaves them.

    Args:
        rows (sequence of `Mapping`):
            With `id`, `status` and `success`.

    Returns:
        `dict`: request -> score; without the rows that were not scored.
    """
    return {str(row["id"]): float(row["success"]) for row in rows if row["status"] == "scored"}


def mean_over(by_attack: Mapping[str, Mapping[str, float]], attacks: Sequence[str]) -> dict[str, float]:
    """
    Mean score of each request over several attacks; only requests that all of them were scored on.

    Args:
        by_attack (`Mapping`):
            Attack -> request -> score.
        attacks (sequence of `str`):
            Which.

    Returns:
        `dict`: request -> mean score.
    """
    parts = [by_attack.get(name, {}) for name in attacks]
    shared = set(parts[0]).intersection(*parts[1:]) if parts else set()
    return {row: sum(part[row] for part in parts) / len(parts) for row in sorted(shared)}
