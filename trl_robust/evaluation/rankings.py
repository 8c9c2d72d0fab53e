"""Whether models find the same wordings hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from .case_scores import RESAMPLES, Interval, Matrix, as_rows, case_intervals, check_settings


class RankingAgreement(TypedDict):
    """What [`ranking_agreement`] returns."""

    kendalls_w: float | None
    interval: Interval | None
    chance: float
    n_models: int
    n_cases: int
    n_excluded: int


def kendalls_w(ratings: Matrix) -> float | None:
    """
    Kendall's coefficient of concordance with the correction for ties: 1 where all raters rank the items alike.

    Args:
        ratings:
            Raters x items, without missing values. With `m` raters who do not look, `1 / m` is expected, not 0.

    Returns:
        `float` in [0, 1]; `None` where every rater ties all items, since there is no ranking.

    Raises:
        `ValueError`: fewer than two raters or items, or a value that is missing.
    """
    values = as_rows(ratings)
    if len(values) < 2 or len({len(row) for row in values}) > 1 or len(values[0]) < 2:
        raise ValueError("Kendall's W needs at least two raters who rate the same items, and at least two items.")
    if any(np.isnan(row).any() for row in values):
        raise ValueError("Kendall's W needs a rating of every item by every rater; leave the others out.")
    m, n = len(values), len(values[0])
    total, ties = np.zeros(n), 0.0
    for row in values:
        _, places, counts = np.unique(row, return_inverse=True, return_counts=True)
        total += (np.cumsum(counts) - (counts - 1) / 2)[places]  # tied items share the mean of their ranks
        ties += float((counts**3 - counts).sum())
    spread = m**2 * (n**3 - n) - m * ties
    return None if spread == 0 else float(12 * ((total - total.mean()) ** 2).sum() / spread)


def ranking_agreement(
    matrices: Sequence[Matrix], *, confidence: float = 0.95, num_resamples: int = RESAMPLES, seed: int = 0
) -> RankingAgreement:
    """
    Whether models find the same wordings hard: Kendall's W of their rankings of a case's wordings, mean over cases.

    Args:
        matrices:
            One matrix a model, as in [`~trl_robust.evaluation.prompt_robustness`], over the same cases and wordings.
        confidence, num_resamples, seed (*optional*):
            As in [`~trl_robust.evaluation.prompt_robustness`].

    Returns:
        `dict` with `kendalls_w`, its `interval`, `chance` (`1 / models`, what rankings at random give), `n_models`,
        `n_cases`, and `n_excluded` (cases with fewer than two wordings scored for all, or with ties only).

    Raises:
        `ValueError`: fewer than two models, or different shapes.
    """
    if len(matrices) < 2:
        raise ValueError(f"{len(matrices)} model has nobody to agree with; give the matrices of at least two.")
    check_settings(confidence, num_resamples)
    models = [as_rows(matrix) for matrix in matrices]
    if len({tuple(map(len, rows)) for rows in models}) > 1:
        raise ValueError("The matrices differ in shape; give the same cases and wordings for every model.")
    found = []
    for rows in zip(*models, strict=True):
        stacked = np.stack(rows)
        stacked = stacked[:, ~np.isnan(stacked).any(0)]
        if stacked.shape[1] >= 2 and (value := kendalls_w(stacked)) is not None:
            found.append([value])
    values = np.array(found).reshape(-1, 1)
    interval = case_intervals(values, [(0.0, 1.0)], confidence=confidence, num_resamples=num_resamples, seed=seed)[0]
    return RankingAgreement(
        kendalls_w=float(values.mean()) if len(values) else None,
        interval=interval,
        chance=1 / len(matrices),
        n_models=len(matrices),
        n_cases=len(values),
        n_excluded=len(models[0]) - len(values),
    )
