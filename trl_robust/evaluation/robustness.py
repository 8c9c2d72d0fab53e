"""How a score holds over several wordings of one question: original, worst, best, spread, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TypedDict

import numpy as np

from .case_scores import RESAMPLES, Interval, Matrix, Scale, as_row, as_rows, case_intervals, check_settings

MEASURES = ("original", "worst", "best", "average", "std", "gap", "worst_3", "cvar")
"""What [`prompt_robustness`] measures, in this order."""

NULL_MEASURES = ("worst", "best", "average", "gap")
"""What [`same_prompt_null`] compares."""

CVAR_LEVEL = 0.25


class WinRateEstimate(TypedDict):
    """What [`win_rate`] returns."""

    win_rate: float | None
    standard_error: float | None
    n: int
    n_missing: int


class RobustnessEstimate(TypedDict):
    """What [`prompt_robustness`] returns."""

    original: float | None
    worst: float | None
    best: float | None
    average: float | None
    std: float | None
    gap: float | None
    worst_3: float | None
    cvar: float | None
    cvar_level: float
    intervals: dict[str, Interval | None]
    n_cases: int
    n_excluded: int
    n_missing: int


class PairedRobustness(TypedDict):
    """What [`paired_robustness`] returns."""

    differences: dict[str, float | None]
    intervals: dict[str, Interval | None]
    cvar_level: float
    n_cases: int
    n_excluded: int
    n_missing: int


class SamePromptNull(TypedDict):
    """What [`same_prompt_null`] returns."""

    null: dict[str, float | None]
    wordings: dict[str, float | None]
    excess: dict[str, float | None]
    intervals: dict[str, Interval | None]
    n_compared: int
    n_cases: int
    n_excluded: int
    n_missing: int


def win_rate(preferences: Sequence[float | None] | np.ndarray) -> WinRateEstimate:
    """
    Mean preference in percent with its standard error, as AlpacaEval reports them.

    Args:
        preferences (`Sequence[float]`):
            For each comparison the probability, in [0, 1], that the model's answer is preferred. `None` or NaN is a
            comparison that could not be judged: it leaves the mean and is counted.

    Returns:
        `dict` with `win_rate` and `standard_error` (sample standard deviation over the root of `n`, both in percent;
        `None` where there are too few), `n` and `n_missing`.

    Raises:
        `ValueError`: a preference outside [0, 1].

    Example:

    ```python
    >>> found = win_rate([1.0, 0.5, 0.0, None])
    >>> found["win_rate"], round(found["standard_error"], 2), found["n"]
    (50.0, 28.87, 3)
    ```
    """
    values = as_row(preferences, 0)
    for position, value in enumerate(values):
        if not np.isnan(value) and not 0 <= value <= 1:
            raise ValueError(
                f"Preference {position} is {value:g}, outside [0, 1]. Give the probability that the model's answer is "
                "preferred; AlpacaEval's 1 to 2 becomes it by taking 1 away."
            )
    scored = values[~np.isnan(values)]
    n = len(scored)
    return WinRateEstimate(
        win_rate=100 * float(scored.mean()) if n else None,
        standard_error=100 * float(scored.std(ddof=1)) / n**0.5 if n > 1 else None,
        n=n,
        n_missing=len(values) - n,
    )


def prompt_robustness(
    matrix: Matrix,
    *,
    cvar_level: float = CVAR_LEVEL,
    scale: Scale | None = None,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> RobustnessEstimate:
    """
    Measures each case over its wordings, the original among them, and averages over cases (Cao et al. 2024, LAP).

    A missing score is never taken for a zero. A case whose original was not scored, or with fewer than two scored
    wordings, is left out of every measure (`n_excluded`), so that worst <= original <= best holds for the means as
    well. Another case with missing scores is measured over those that it has; its worst is then over fewer wordings
    and a little too good, so look at `n_missing` first.

    Args:
        matrix (`Sequence[Sequence[float]]` or `np.ndarray`):
            Cases x wordings, wording 0 the original; higher is better. Scores are any real numbers; `None` or NaN
            where there is none. Cases may have different numbers of wordings.
        cvar_level (`float`, *optional*, defaults to `0.25`):
            Share of the wordings, the lowest, that `cvar` averages. Where that is no whole number of wordings, the
            last one counts by the part that is left.
        scale (`tuple[float, float]`, *optional*):
            Lowest and highest score there can be. Used only where all cases agree: resampling then has no spread, and
            the interval is widened towards the ends of the scale as in [`attack_success`]. Without a scale there is
            no interval in that case.
        confidence (`float`, *optional*, defaults to `0.95`):
            Coverage of the percentile bootstrap intervals over cases.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `dict`: means over cases of `original`, `worst`, `best`, `average`, `std` (population, per case), `gap` (best
        minus worst), `worst_3` (mean of the three lowest) and `cvar`; `cvar_level`; `intervals` (for each of them
        `[low, high]`, or `None`); `n_cases`, `n_excluded` and `n_missing` (scores, over all cases).

    Raises:
        `ValueError`: no cases, an infinite score, a level or confidence out of range.

    Example:

    ```python
    >>> found = prompt_robustness([[0.5, 0.1, 0.9], [0.4, 0.4, None]])
    >>> found["worst"], found["n_cases"], found["n_missing"]
    (0.25, 2, 1)
    ```
    """
    _check_level(cvar_level)
    check_settings(confidence, num_resamples, scale)
    rows = as_rows(matrix)
    measured = [found for row in rows if (found := _measures_of(row, cvar_level)) is not None]
    values = np.array(measured).reshape(-1, len(MEASURES))
    means = values.mean(0) if len(values) else None
    intervals = case_intervals(
        values,
        [_range_of(name, scale) for name in MEASURES],
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    measures = {name: None if means is None else float(means[i]) for i, name in enumerate(MEASURES)}
    return RobustnessEstimate(
        **measures,  # type: ignore[typeddict-item]
        cvar_level=cvar_level,
        intervals=dict(zip(MEASURES, intervals, strict=True)),
        n_cases=len(values),
        n_excluded=len(rows) - len(values),
        n_missing=sum(int(np.isnan(row).sum()) for row in rows),
    )


def paired_robustness(
    matrix_a: Matrix,
    matrix_b: Matrix,
    *,
    cvar_level: float = CVAR_LEVEL,
    scale: Scale | None = None,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedRobustness:
    """
    Every measure of [`prompt_robustness`] on `matrix_b` minus that on `matrix_a`, with a paired bootstrap over cases.

    Both are measured on the same wordings of the same cases: a wording that either lacks counts for neither.

    Args:
        matrix_a, matrix_b:
            Scores of two models on the same cases and wordings, as in [`prompt_robustness`].
        cvar_level, scale, confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        `dict` with `differences` (b minus a, above 0 where b is higher) and `intervals` for each measure,
        `cvar_level`, `n_cases` (scored in both), `n_excluded` and `n_missing` (wordings that either lacks).

    Raises:
        `ValueError`: the two differ in shape, or as in [`prompt_robustness`].
    """
    _check_level(cvar_level)
    check_settings(confidence, num_resamples, scale)
    pairs = _paired(matrix_a, matrix_b, "matrix_a", "matrix_b", same_width=True)
    values, n_missing = [], 0
    for row_a, row_b in pairs:
        missing = np.isnan(row_a) | np.isnan(row_b)
        n_missing += int(missing.sum())
        both = [_measures_of(np.where(missing, np.nan, row), cvar_level) for row in (row_a, row_b)]
        if both[0] is not None and both[1] is not None:
            values.append(both[1] - both[0])
    differences = np.array(values).reshape(-1, len(MEASURES))
    intervals = case_intervals(
        differences,
        [_around_zero(_range_of(name, scale)) for name in MEASURES],
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    means = differences.mean(0) if len(differences) else None
    return PairedRobustness(
        differences={name: None if means is None else float(means[i]) for i, name in enumerate(MEASURES)},
        intervals=dict(zip(MEASURES, intervals, strict=True)),
        cvar_level=cvar_level,
        n_cases=len(differences),
        n_excluded=len(pairs) - len(differences),
        n_missing=n_missing,
    )


def same_prompt_null(
    matrix: Matrix,
    samples: Matrix,
    *,
    scale: Scale | None = None,
    confidence: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> SamePromptNull:
    """
    What of worst, best and gap is luck of decoding: the same measures over samples of the *same* prompt.

    At temperature 1 the worst of 11 answers to one prompt is already bad. Only what the wordings do beyond that is
    theirs. Fewer samples than wordings (or more) would not compare, since the worst of more is worse: both are
    measured as the expected worst, best and gap of `m` answers drawn without replacement, `m` the smaller number of
    the two in that case.

    Args:
        matrix:
            Scores over wordings, as in [`prompt_robustness`].
        samples:
            Scores of several answers to the original wording of the same cases.
        scale, confidence, num_resamples, seed (*optional*):
            As in [`prompt_robustness`].

    Returns:
        `dict` with `null` and `wordings` (for each of [`NULL_MEASURES`]), `excess` (wordings minus null; `worst`
        below 0 and `gap` above 0 where wordings matter), `intervals` of the excess (paired, over cases), `n_compared`
        (the smallest `m`), `n_cases`, `n_excluded` (a side with fewer than two scores) and `n_missing` (samples
        without a score).

    Raises:
        `ValueError`: different numbers of cases, or as in [`prompt_robustness`].
    """
    check_settings(confidence, num_resamples, scale)
    pairs = _paired(matrix, samples, "matrix", "samples", same_width=False)
    of_null, of_wordings, compared = [], [], []
    for row, drawn in pairs:
        sides = [np.sort(side[~np.isnan(side)]) for side in (row, drawn)]
        m = min(map(len, sides))
        if m >= 2:
            compared.append(m)
            of_wordings.append(_expected_of(sides[0], m))
            of_null.append(_expected_of(sides[1], m))
    null, wordings = (np.array(side).reshape(-1, len(NULL_MEASURES)) for side in (of_null, of_wordings))
    excess = wordings - null
    intervals = case_intervals(
        excess,
        [_around_zero(_range_of(name, scale)) for name in NULL_MEASURES],
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )

    def means(values: np.ndarray) -> dict[str, float | None]:
        return {name: float(values[:, i].mean()) if len(values) else None for i, name in enumerate(NULL_MEASURES)}

    return SamePromptNull(
        null=means(null),
        wordings=means(wordings),
        excess=means(excess),
        intervals=dict(zip(NULL_MEASURES, intervals, strict=True)),
        n_compared=min(compared, default=0),
        n_cases=len(excess),
        n_excluded=len(pairs) - len(excess),
        n_missing=sum(int(np.isnan(drawn).sum()) for _, drawn in pairs),
    )


def _measures_of(row: np.ndarray, cvar_level: float) -> np.ndarray | None:
    """The measures of a case in the order of `MEASURES`, or `None` for one that cannot be measured."""
    scored = np.sort(row[~np.isnan(row)])
    n = len(scored)
    if n < 2 or np.isnan(row[0]):
        return None
    worst, best = scored[0], scored[-1]
    weight = cvar_level * n
    weights = np.clip(weight - np.arange(n), 0, 1)
    cvar = float(weights @ scored) / weight
    # Rounding must not put a mean of equal scores outside them, nor give them a spread.
    average, worst_3, cvar = np.clip([scored.mean(), scored[:3].mean(), cvar], worst, best)
    std = scored.std() if best > worst else 0.0
    return np.array([row[0], worst, best, average, std, best - worst, worst_3, cvar])


def _expected_of(scored: np.ndarray, m: int) -> np.ndarray:
    """Expected worst, best, average and gap of `m` of these sorted scores, drawn without replacement."""
    n = len(scored)
    # The i-th lowest is the lowest of the m where the other m - 1 lie above it.
    weights = np.array([comb(n - 1 - i, m - 1) for i in range(n)], dtype=float) / comb(n, m)
    worst, best = float(weights @ scored), float(weights[::-1] @ scored)
    return np.array([worst, best, scored.mean(), best - worst])


def _paired(
    matrix_a: Matrix, matrix_b: Matrix, name_a: str, name_b: str, *, same_width: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    rows_a, rows_b = as_rows(matrix_a), as_rows(matrix_b)
    if len(rows_a) != len(rows_b):
        raise ValueError(
            f"{name_a} has {len(rows_a)} cases and {name_b} {len(rows_b)}. Give both the same cases in the same "
            "order; a row of None stands for a case without scores."
        )
    pairs = list(zip(rows_a, rows_b, strict=True))
    for number, (row_a, row_b) in enumerate(pairs):
        if same_width and len(row_a) != len(row_b):
            raise ValueError(
                f"Case {number} has {len(row_a)} wordings in {name_a} and {len(row_b)} in {name_b}. Give both the "
                "same wordings, None where one has no score."
            )
    return pairs


def _range_of(measure: str, scale: Scale | None) -> Scale | None:
    """The lowest and highest value that a measure can have where scores have this scale."""
    if scale is None:
        return None
    width = scale[1] - scale[0]
    return {"gap": (0.0, width), "std": (0.0, width / 2)}.get(measure, scale)


def _around_zero(scale: Scale | None) -> Scale | None:
    return None if scale is None else (scale[0] - scale[1], scale[1] - scale[0])


def _check_level(cvar_level: float) -> None:
    if not 0 < cvar_level <= 1:
        raise ValueError(f"cvar_level={cvar_level} must lie above 0 and at most at 1, for example 0.25.")
