"""How far two judges of the same answers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from .correlation import CONFIDENCE, RESAMPLES
from .metrics import _interval, _score


class Agreement(TypedDict):
    """What [`agreement`] returns."""

    agreement: float | None
    interval: list[float] | None
    kappa: float | None
    kappa_interval: list[float] | None
    success: list[float] | None
    n: int
    n_not_both: int
    disagreeing: list[Any]
    why: str | None


def agreement(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> Agreement:
    """
    How far two judges agree on the same answers.

    Args:
        first, second (sequence of `Mapping`):
            Rows with `id`, `status` and `success`, as [`~trl_robust.evaluation.judged`] gives them.
            Rows of the same id are paired in their order.
        threshold (`float`, *optional*, defaults to `0.5`):
            Success from which on a graded answer counts as harmful.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap over requests: answers to one request are drawn together.

    Returns:
        [`Agreement`]: `agreement`, the share of answers on which both say the same; `kappa`, Cohen's, which is 0 where
        they agree as often as their rates alone would have it and 1 where they always do (`None` where both say the
        same of all answers: then there is nothing to agree about, and `why` says so); `success`, the share that each
        of them calls harmful; `disagreeing`, the ids of the others; `n_not_both`, rows that not both have scored.
    """
    sides = [_by_name(rows) for rows in (first, second)]
    shared = [name for name, value in sides[0].items() if value is not None and sides[1].get(name) is not None]
    found = Agreement(
        agreement=None,
        interval=None,
        kappa=None,
        kappa_interval=None,
        success=None,
        n=len(shared),
        n_not_both=len(sides[0].keys() | sides[1].keys()) - len(shared),
        disagreeing=[],
        why=None,
    )
    if not shared:
        found["why"] = "no answer was scored by both judges"
        return found
    table = np.array([[side[name] >= threshold for name in shared] for side in sides])  # type: ignore[operator]
    same = table[0] == table[1]
    found["agreement"] = float(same.mean())
    found["success"] = [float(column.mean()) for column in table]
    found["disagreeing"] = [name[0] for name, equal in zip(shared, same, strict=True) if not equal]
    # Answers to one request, of an attack that tries several times or at several budgets, are not independent.
    number_of: dict[Hashable, int] = {}
    request = np.array([number_of.setdefault(name[0], len(number_of)) for name in shared])
    cells_of = np.zeros((len(number_of), 4), dtype=int)
    np.add.at(cells_of, (request, 2 * table[0] + table[1]), 1)
    found["interval"] = _interval(
        (cells_of[:, 0] + cells_of[:, 3]).astype(float), cells_of.sum(1), (0.0, 1.0), CONFIDENCE, RESAMPLES, seed
    )
    cells = cells_of.sum(0)
    kappa = float(_kappa(cells))
    if np.isnan(kappa):
        found["why"] = "both judges say the same of every answer, so that chance alone would make them agree"
        return found
    found["kappa"] = kappa
    # Requests of one kind are interchangeable: what is drawn is how often each kind comes up.
    kinds, counts = np.unique(cells_of, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(cells_of), counts / len(cells_of), size=RESAMPLES)
    drawn = _kappa(draws @ kinds)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) >= RESAMPLES / 2:
        tail = (1 - CONFIDENCE) / 2
        found["kappa_interval"] = [float(end) for end in np.quantile(drawn, [tail, 1 - tail])]
    return found


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Hashable, int], float | None]:
    seen: Counter[Hashable] = Counter()
    found: dict[tuple[Hashable, int], float | None] = {}
    for position, row in enumerate(rows):
        if row.get("id") is None:
            raise ValueError(f"Row {position} has no `id`; both judges' rows are paired by it.")
        name = (row["id"], seen[row["id"]])
        seen[row["id"]] += 1
        found[name] = _score(row, position) if row.get("status", "scored") == "scored" else None
    return found


def _kappa(cells: np.ndarray) -> np.ndarray:
    """Cohen's kappa of counts (no-no, no-yes, yes-no, yes-yes); NaN where chance agreement is certain."""
    no_no, no_yes, yes_no, yes_yes = np.moveaxis(cells / cells.sum(-1, keepdims=True), -1, 0)
    chance = (yes_no + yes_yes) * (no_yes + yes_yes) + (no_no + no_yes) * (no_no + yes_no)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance > 1 - 1e-12, np.nan, (no_no + yes_yes - chance) / (1 - chance))
