"""Rank correlation and paired tests for cases with several wordings: exact formulas, and a bootstrap over cases.

Numpy only. The tests compare every value with one worked by hand or taken from an independent library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lgamma
from statistics import NormalDist
from typing import TypedDict

import numpy as np

Numbers = Sequence[float] | np.ndarray
CONFIDENCE = 0.95
RESAMPLES = 2000
SPEARMAN_SPREAD = 1.06
"""Variance of Fisher's z of a Spearman correlation, times n - 3 (Fieller, Hartley and Pearson, 1957)."""


class Correlation(TypedDict):
    """A rank correlation and how sure it is. `rho` is `None` where it is undefined, and `why` says so."""

    rho: float | None
    p: float | None
    interval: list[float] | None
    n: int
    why: str | None


class PairedTest(TypedDict):
    """A mean difference of pairs with its tests. `None` where there are too few pairs."""

    difference: float | None
    interval: list[float] | None
    t: float | None
    p: float | None
    p_sign_flip: float | None
    n: int


def ranks(values: Numbers) -> np.ndarray:
    """
    Ranks from 1; equal values share the mean of theirs.

    Args:
        values (sequence of `float`):
            Numbers.

    Returns:
        `np.ndarray` of the same length.
    """
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """
    Pearson's correlation.

    Args:
        x, y (`np.ndarray`):
            Numbers, paired.

    Returns:
        `float`; NaN where one of both does not vary.
    """
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    # Rounding leaves a constant column with a spread of about 1e-16.
    return float(np.clip(x @ y / size, -1, 1)) if size > 1e-12 * max(1.0, len(x)) else float("nan")


def student_p(t: float, degrees: float) -> float:
    """
    Two-sided p of Student's t.

    Args:
        t (`float`):
            The statistic.
        degrees (`float`):
            Degrees of freedom, above 0.

    Returns:
        `float`.
    """
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def spearman(
    x: Numbers,
    y: Numbers,
    *,
    controls: Sequence[Numbers] = (),
    clusters: Sequence[int] | np.ndarray | None = None,
    names: tuple[str, str] = ("x", "y"),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Correlation:
    """
    Spearman's rank correlation, plain or partial, with p and a percentile bootstrap interval.

    Partial: the ranks of both sides, less what a straight line in the ranks of the controls explains, are correlated.
    p is Student's, with `n - 2 - number of controls` degrees of freedom. With `clusters`, rows of one cluster are not
    independent: whole clusters are drawn, and there is no p, since Student's would count them as independent rows.

    Args:
        x, y (sequence of `float`):
            Numbers, paired.
        controls (sequence of sequences, *optional*):
            What is held fixed, of the same length each.
        clusters (sequence of `int`, *optional*):
            Cluster of every row.
        names (`tuple[str, str]`, *optional*, defaults to `("x", "y")`):
            What `why` calls both sides.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        resamples (`int`, *optional*, defaults to `2000`):
            Its size.

    Returns:
        [`Correlation`].

    Raises:
        `ValueError`: columns of different lengths.
    """
    columns = [np.asarray(column, dtype=float) for column in (x, y, *controls)]
    n = len(columns[0])
    if any(len(column) != n for column in columns):
        raise ValueError(f"The columns have lengths {[len(column) for column in columns]}; they must be paired.")
    result = Correlation(rho=None, p=None, interval=None, n=n, why=None)
    degrees = n - 2 - len(controls)
    if degrees < 1:
        result["why"] = f"{n} rows are too few for {len(controls)} controls"
        return result
    table = np.stack(columns)
    for name, column in zip(names, columns[:2], strict=True):
        if np.ptp(column) == 0:
            result["why"] = f"{name} has one value only, {column[0]:g}"
            return result
    rho = _partial(table)
    if not np.isfinite(rho):
        result["why"] = "the controls explain one side entirely"
        return result
    result["rho"] = rho
    if clusters is None:
        result["p"] = student_p(rho * np.sqrt(degrees / max(1 - rho * rho, 1e-300)), degrees)
    result["interval"] = bootstrap(
        lambda rows: _partial(table[:, rows]), n, clusters=clusters, seed=seed, size=resamples
    )
    return result


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    clusters: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    size: int = RESAMPLES,
) -> list[float] | None:
    """
    Percentile bootstrap interval.

    Args:
        statistic (`Callable`):
            From the indices of the rows drawn to a number. Draws on which it is NaN are left out.
        n (`int`):
            Number of rows.
        clusters (sequence of `int`, *optional*):
            Cluster of every row: clusters are drawn with all their rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed.
        size (`int`, *optional*, defaults to `2000`):
            Number of draws.

    Returns:
        `list[float]`: both ends of the 95 % interval, or `None` if the statistic was a number in fewer than half the
        draws.
    """
    generator = np.random.default_rng(seed)
    if clusters is None:
        members = [np.array([row]) for row in range(n)]
    else:
        labels = np.asarray(clusters)
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    found = []
    for _ in range(size):
        drawn = generator.integers(len(members), size=len(members))
        found.append(statistic(drawn if clusters is None else np.concatenate([members[number] for number in drawn])))
    values = np.array(found, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < size / 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    return [float(end) for end in np.quantile(values, [tail, 1 - tail])]


def paired_test(first: Numbers, second: Numbers, *, seed: int = 0) -> PairedTest:
    """
    Whether `first` is larger than `second` over the same cases: paired t, a sign-flip test, a bootstrap interval.

    Args:
        first, second (sequence of `float`):
            Numbers, paired by case. Pairs with a NaN are left out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sign flips (10,000) and of the bootstrap.

    Returns:
        [`PairedTest`] of `first - second`, both p two-sided.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    result = PairedTest(difference=None, interval=None, t=None, p=None, p_sign_flip=None, n=n)
    if n == 0:
        return result
    mean = float(differences.mean())
    result["difference"] = mean
    if n < 2:
        return result
    spread = float(differences.std(ddof=1))
    result["interval"] = bootstrap(lambda rows: float(differences[rows].mean()), n, seed=seed)
    if spread > 0:
        t = mean / (spread / float(np.sqrt(n)))
        result["t"], result["p"] = t, student_p(t, n - 1)
    generator = np.random.default_rng(seed)
    flipped = np.abs(generator.choice([-1.0, 1.0], size=(10_000, n)) @ differences / n)
    # The order as given is one of the possible ones, so p is never 0.
    result["p_sign_flip"] = float((np.sum(flipped >= abs(mean) - 1e-12) + 1) / (len(flipped) + 1))
    return result


def shuffled_rhos(x: Numbers, y: Numbers, *, seed: int = 0, size: int = 1000) -> np.ndarray:
    """
    Spearman correlations after the values of `x` were exchanged between the rows at random.

    Args:
        x, y (sequence of `float`):
            Numbers, paired.
        seed (`int`, *optional*, defaults to `0`):
            Seed.
        size (`int`, *optional*, defaults to `1000`):
            Number of exchanges.

    Returns:
        `np.ndarray` of `size` correlations.
    """
    generator = np.random.default_rng(seed)
    first, second = ranks(x), ranks(y)
    return np.array([pearson(generator.permutation(first), second) for _ in range(size)])


def power(rho: float, n: int) -> float | None:
    """
    Probability that a two-sided test at 5 % finds a Spearman correlation in `n` cases, by Fisher's z.

    Args:
        rho (`float`):
            The true correlation.
        n (`int`):
            Cases.

    Returns:
        `float`, or `None` for fewer than 5 cases.
    """
    if n < 5:
        return None
    normal = NormalDist()
    shift = np.arctanh(rho) / np.sqrt(SPEARMAN_SPREAD / (n - 3))
    critical = normal.inv_cdf(0.975)
    return normal.cdf(shift - critical) + normal.cdf(-shift - critical)


def detectable(n: int) -> float | None:
    """
    The smallest Spearman correlation that `n` cases find with a probability of 80 % at a level of 5 %.

    Args:
        n (`int`):
            Cases.

    Returns:
        `float`, or `None` for fewer than 5 cases.
    """
    if n < 5:
        return None
    normal = NormalDist()
    return float(np.tanh((normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * np.sqrt(SPEARMAN_SPREAD / (n - 3))))


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """
    Levenshtein distance: insertions, deletions and replacements that turn one sequence into the other.

    Args:
        first, second (sequence of `str`):
            Words, or a string as its characters.

    Returns:
        `int`.
    """
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (one != other))
    return row[-1]


def _partial(table: np.ndarray) -> float:
    """Partial Spearman correlation of the first two rows of a table, the others held fixed."""
    ranked = np.stack([ranks(column) for column in table])
    if len(ranked) == 2:
        return pearson(ranked[0], ranked[1])
    basis = np.column_stack([np.ones(ranked.shape[1]), ranked[2:].T])
    sides = ranked[:2].T
    residuals = sides - basis @ np.linalg.lstsq(basis, sides, rcond=None)[0]
    # Against the spread before, so that a side that the controls explain up to rounding has no correlation.
    spread = sides.std(0)
    if np.any(residuals.std(0) <= 1e-9 * spread) or np.any(spread == 0):
        return float("nan")
    return pearson(residuals[:, 0], residuals[:, 1])


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz's way of evaluating it)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other tail converges faster
        return 1 - _incomplete_beta(1 - x, b, a)
    log_front = a * np.log(x) + b * np.log1p(-x) - _log_beta(a, b) - np.log(a)
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for step in range(400):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        fraction *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return float(np.exp(log_front) * (fraction - 1))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
