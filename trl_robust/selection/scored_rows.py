"""The rows of a dataset as a selector sees them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.hashing import row_hashes
from .selector import Selector


@dataclass
class ScoredRows:
    """
    What a selector has to say of every row of a dataset; each array is of shape `(n,)`, in the dataset's order.

    Args:
        hashes (`list[str]`):
            Hashes of the rows.
        known (`np.ndarray`, bool):
            Rows that the selector was trained on.
        scored (`np.ndarray`, bool):
            Those of them that an update has seen, or that say the same as such a row.
        kept (`np.ndarray`, bool):
            Rows that were chosen.
        scores (`np.ndarray`):
            Scores less `mean_score`, since softmax does not see what all of them have in common; nan where none.
        weights (`np.ndarray`):
            Weights; nan where none.
        mean_score (`float`):
            Mean score of all the selector's rows.
        statistics (`dict[str, np.ndarray]`):
            The selector's statistics, as floats; nan where none.
    """

    hashes: list[str]
    known: np.ndarray
    scored: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    mean_score: float
    statistics: dict[str, np.ndarray]

    @classmethod
    def of(cls, selector: Selector, dataset: Dataset, kept: Sequence[int]) -> ScoredRows:
        """
        Finds a dataset's rows in a selector.

        Args:
            selector ([`Selector`]):
                Scores.
            dataset ([`~datasets.Dataset`]):
                Rows, which are matched by their hashes.
            kept (sequence of `int`):
                Numbers of the rows that were chosen.

        Returns:
            [`ScoredRows`].
        """
        hashes = row_hashes(dataset)
        places = _places(selector.row_hashes, hashes)
        known = places >= 0
        at = np.where(known, places, 0)

        def spread(values: Any) -> np.ndarray:
            values = np.asarray(values, dtype=np.float64)
            return np.where(known, values[at], np.nan) if len(values) else np.full(len(hashes), np.nan)

        statistics = {name: spread(values.numpy()) for name, values in selector.statistics.items()}
        scores = selector.scores.numpy()
        mean = float(scores.mean()) if len(scores) else 0.0
        chosen = np.zeros(len(hashes), dtype=bool)
        chosen[list(kept)] = True
        scored = known & _visited(selector, hashes)
        return cls(
            hashes=hashes,
            known=known,
            scored=scored,
            kept=chosen,
            scores=np.where(scored, spread(scores - mean), np.nan),
            weights=np.where(scored, spread(selector.weights().numpy()), np.nan),
            mean_score=mean,
            statistics=statistics,
        )

    def ranked(self) -> list[int]:
        """
        The scored rows from the first to be kept to the last, as [`Selector.select`] ranks them.

        Returns:
            `list[int]`: row numbers.
        """
        numbers = np.flatnonzero(self.scored).tolist()
        return sorted(numbers, key=lambda number: (-self.scores[number], self.hashes[number], number))


def _places(known: Sequence[str], hashes: Sequence[str]) -> np.ndarray:
    """Where each row stands in the selector, or -1; the second of two identical rows is the second one there."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(known):
        places[name].append(place)
    seen: Counter[str] = Counter()
    found = []
    for name in hashes:
        copies = places.get(name)
        found.append(-1 if copies is None else copies[min(seen[name], len(copies) - 1)])
        seen[name] += 1
    return np.array(found, dtype=np.int64)


def _visited(selector: Selector, hashes: Sequence[str]) -> np.ndarray:
    """Whether an update has seen the row, or one that says the same."""
    visits = selector.statistics.get("visits")
    if visits is None:
        return np.ones(len(hashes), dtype=bool)
    seen = {name for name, number in zip(selector.row_hashes, visits.tolist(), strict=True) if number > 0}
    return np.array([name in seen for name in hashes], dtype=bool)
