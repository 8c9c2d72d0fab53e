"""What a selector chose, and what its scores go along with: the content of `selection.json`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.cells import rows_named
from ..data.errors import DataError
from ..data.hashing import CONTENTS
from .scored_rows import ScoredRows
from .selector import Selector
from .statistics import auroc, effective_fraction, jaccard, precision_at, spearman

SCHEMA = 1
BINS = 30
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the rows at which precision is told, beside the share that was kept."""
VISIT_TIME = 0.1
"""Correlation of score and visits above which a ranking tells when rows were seen (seal.md 11)."""
AGREEMENT = 0.5
"""Correlation of two selectors below which they choose different rows (seal.md 11)."""
FEW = 0.05
"""Effective share of the rows below which weights rest on a few of them."""


def summarize(
    selector: Selector,
    dataset: Dataset,
    kept: Sequence[int],
    *,
    label_column: str | None = None,
    source_column: str | None = None,
    others: Mapping[str, Selector] | None = None,
    examples: int = 10,
) -> dict[str, Any]:
    """
    Describes a selection in plain values.

    Only rows that the selector knows and has visited have a score; the others are counted and in nothing else. Scores
    are told as their difference to the mean of all the selector's scores, which is `mean_score`.

    Args:
        selector ([`Selector`]):
            What the rows were chosen by.
        dataset ([`~datasets.Dataset`]):
            All rows, before the choice.
        kept (sequence of `int`):
            Numbers of the rows that are kept.
        label_column (`str`, *optional*):
            Column that is true (or 1) in rows that had better not be kept.
        source_column (`str`, *optional*):
            Column that says where a row comes from.
        others (`Mapping[str, Selector]`, *optional*):
            Other selectors to compare with, by the name to call them by. Rows are matched by their hash.
        examples (`int`, *optional*, defaults to `10`):
            Rows shown at the top, at the bottom and around the threshold; of identical rows the first.

    Returns:
        `dict` of JSON values: `rows` (counts), `threshold` (weight of the last row that is kept), `histograms`,
        `visits`, `effective_fraction`, `correlations`, `labels`, `sources`, `agreement`, `examples` and `warnings`.
        What does not exist is `None`. Texts of rows are in `examples` as they are.

    Raises:
        [`~trl_robust.data.DataError`]: a column that is not there, or a label that is neither true nor false.
        `ValueError`: a kept row that the dataset does not have.
    """
    if wrong := sorted(number for number in set(kept) if not 0 <= number < len(dataset)):
        raise ValueError(f"`kept` names {rows_named(wrong)}; the dataset has {len(dataset)} rows, counted from 0.")
    rows = ScoredRows.of(selector, dataset, kept)
    labels = _labels(dataset, label_column)
    sources = None if source_column is None else [str(value) for value in _column(dataset, source_column)]
    scores, kept_scores = rows.scores[rows.scored], rows.scores[rows.scored & rows.kept]
    last = kept_scores.min() if len(kept_scores) else None
    visits = rows.statistics.get("visits")
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "method": selector.settings.get("method"),
        "function": selector.function,
        "normalized": selector.normalized,
        "settings": _plain(selector.settings),
        "rows": {
            "dataset": len(dataset),
            "scored": int(rows.scored.sum()),
            "unknown": int((~rows.known).sum()),
            "unvisited": int((rows.known & ~rows.scored).sum()),
            "missing": len(set(selector.row_hashes) - set(rows.hashes)),
            "kept": int(rows.kept.sum()),
            "kept_without_score": int((rows.kept & ~rows.scored).sum()),
        },
        "mean_score": rows.mean_score,
        "threshold": None if last is None else float(rows.weights[rows.scored & (rows.scores == last)][0]),
        "threshold_score": None if last is None else float(last),
        "tied": 0 if last is None else int((scores == last).sum()),
        "histograms": {
            "score": _histogram(rows, rows.scores, labels),
            "weight": _histogram(rows, rows.weights, labels),
        },
        "visits": None if visits is None else _visits(visits[rows.known]),
        "effective_fraction": {
            "all": effective_fraction(rows.weights[rows.scored]),
            "kept": effective_fraction(rows.weights[rows.scored & rows.kept]),
        },
        "correlations": _correlations(rows),
        "labels": None if labels is None else {"column": label_column, **_label_numbers(rows, labels)},
        "sources": None if sources is None else _source_numbers(rows, sources, labels),
        "agreement": {name: _agreement(rows, other, dataset, sources) for name, other in (others or {}).items()},
        "examples": _examples(rows, dataset, labels, sources, examples),
    }
    return found | {"warnings": _warnings(found)}


def _column(dataset: Dataset, column: str) -> list[Any]:
    if column not in dataset.column_names:
        raise DataError(f"The dataset has no column {column!r}; it has {dataset.column_names}.")
    return list(dataset[column])


def _labels(dataset: Dataset, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    values = _column(dataset, column)
    if strange := [number for number, value in enumerate(values) if value not in (0, 1)]:
        raise DataError(
            f"The label `{column}` is neither true nor false (1 or 0) in {rows_named(strange)}. Write true in rows "
            "that had better not be kept, and false in all others."
        )
    return np.array(values, dtype=bool)


def _histogram(rows: ScoredRows, values: np.ndarray, labels: np.ndarray | None) -> dict[str, Any] | None:
    """Rows a bin, for all rows with a score, those that are kept, and those with the label."""
    if not rows.scored.any():
        return None
    found = values[rows.scored]
    low, high = found.min(), found.max()
    # Values that differ by rounding alone are one value.
    even = high - low <= 1e-12 * max(1.0, abs(low), abs(high))
    edges = np.array([low - 0.5, low + 0.5]) if even else np.linspace(low, high, BINS + 1)
    groups = {"all": rows.scored, "kept": rows.scored & rows.kept}
    if labels is not None:
        groups["labelled"] = rows.scored & labels
    counts = {name: np.histogram(values[group], edges)[0].tolist() for name, group in groups.items()}
    return {"edges": edges.tolist(), "counts": counts}


def _visits(visits: np.ndarray) -> dict[str, Any] | None:
    """Rows for every number of visits; for ranges of numbers where there are many."""
    if not len(visits):
        return None
    whole = visits.astype(np.int64)
    low, high = int(whole.min()), int(whole.max())
    width = math.ceil((high - low + 1) / BINS)
    bins = np.bincount((whole - low) // width)
    return {
        "min": low,
        "max": high,
        "mean": float(whole.mean()),
        "width": width,
        "counts": [[low + width * number, int(count)] for number, count in enumerate(bins)],
    }


def _correlations(rows: ScoredRows) -> dict[str, Any]:
    """Spearman's rho of the score with what was seen of a row, over rows of which it was seen."""
    found: dict[str, Any] = {}
    for name in ("length", "first_loss", "last_visit_step", "visits"):
        values = rows.statistics.get(name)
        if values is None:
            found[name] = None
            continue
        both = rows.scored & ~np.isnan(values)
        if name == "last_visit_step":
            both &= values >= 0
        rho = spearman(rows.scores[both], values[both])
        found[name] = {"rho": rho, "n": int(both.sum()), "why": _why(rows.scores[both], values[both], rho)}
    return found


def _why(x: np.ndarray, y: np.ndarray, rho: float | None) -> str | None:
    if rho is not None:
        return None
    if len(x) < 2:
        return "fewer than two rows"
    return "all scores are equal" if x.min() == x.max() else "the other is the same in every row"


def _label_numbers(rows: ScoredRows, labels: np.ndarray) -> dict[str, Any]:
    scored = rows.scored
    scores, wrong = rows.scores[scored], labels[scored]
    kept, kept_wrong = int(rows.kept.sum()), int((rows.kept & labels).sum())
    total = int(labels.sum())
    counts = {math.floor(share * len(scores) + 1e-9): share for share in SHARES}
    return {
        "labelled": total,
        "unlabelled": len(labels) - total,
        "auroc": auroc(scores, wrong),
        "kept_labelled": kept_wrong,
        "kept_labelled_share": kept_wrong / total if total else None,
        "precision_kept": (kept - kept_wrong) / kept if kept else None,
        "precision_all": (len(labels) - total) / len(labels) if len(labels) else None,
        "precision_at": [
            {"share": share, "k": k, "precision": precision_at(scores, wrong, k)} for k, share in counts.items() if k
        ],
    }


def _source_numbers(rows: ScoredRows, sources: list[str], labels: np.ndarray | None) -> dict[str, Any]:
    found = {}
    for name, own in _groups(sources).items():
        kept, weights = rows.kept[own], rows.weights[own][rows.scored[own]]
        found[name] = {
            "rows": len(own),
            "kept": int(kept.sum()),
            "keep_rate": float(kept.mean()),
            "mean_weight": float(weights.mean()) if len(weights) else None,
            "labelled": None if labels is None else int(labels[own].sum()),
            "kept_labelled": None if labels is None else int((labels[own] & kept).sum()),
        }
    return found


def _groups(sources: list[str]) -> dict[str, np.ndarray]:
    """Row numbers of every source, in the order in which sources come up."""
    groups = defaultdict(list)
    for number, name in enumerate(sources):
        groups[name].append(number)
    return {name: np.array(numbers) for name, numbers in groups.items()}


def _agreement(rows: ScoredRows, other: Selector, dataset: Dataset, sources: list[str] | None) -> dict[str, Any]:
    theirs = ScoredRows.of(other, dataset, [])
    both = rows.scored & theirs.scored
    rho = spearman(rows.scores[both], theirs.scores[both])
    within = {}
    for name, own in _groups(sources or []).items():
        shared = own[both[own]]
        within[name] = {"rho": spearman(rows.scores[shared], theirs.scores[shared]), "n": len(shared)}
    kept = set(np.flatnonzero(both & rows.kept).tolist())
    # The other keeps as many of the rows that both know.
    their_kept = set([number for number in theirs.ranked() if both[number]][: len(kept)])
    n, k = int(both.sum()), len(kept)
    shared_by_chance = k * k / n if n else 0.0
    return {
        "method": other.settings.get("method"),
        "n": n,
        "rho": rho,
        "why": _why(rows.scores[both], theirs.scores[both], rho),
        "within_source": within if sources is not None else None,
        "jaccard": jaccard(kept, their_kept),
        "jaccard_by_chance": shared_by_chance / (2 * k - shared_by_chance) if k else None,
        "flagged": rho is not None and rho < AGREEMENT,
    }


def _examples(
    rows: ScoredRows, dataset: Dataset, labels: np.ndarray | None, sources: list[str] | None, number: int
) -> dict[str, list[dict[str, Any]]]:
    """The first and the last rows of the ranking, and the last that are kept beside the first that are not."""
    copies = Counter(rows.hashes)
    first: dict[str, int] = {}
    for place in rows.ranked():
        first.setdefault(rows.hashes[place], place)
    ranked = list(first.values())
    kept = [place for place in ranked if rows.kept[place]]
    dropped = [place for place in ranked if not rows.kept[place]]
    last = max(0, len(kept) - (number - number // 2))
    shown = {
        "top": ranked[:number],
        "borderline": kept[last:] + dropped[: number // 2],
        "bottom": ranked[::-1][:number],
    }
    columns = [column for column in CONTENTS if column in dataset.column_names]

    def example(place: int) -> dict[str, Any]:
        row = dataset[place]
        return {
            "row": place,
            "hash": rows.hashes[place],
            "copies": copies[rows.hashes[place]],
            "score": float(rows.scores[place]),
            "weight": float(rows.weights[place]),
            "kept": bool(rows.kept[place]),
            "label": None if labels is None else bool(labels[place]),
            "source": None if sources is None else sources[place],
            "text": {column: _plain(row[column]) for column in columns if row[column] is not None},
        }

    return {name: [example(place) for place in places] for name, places in shown.items()}


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON cannot write is written as text, and what is no number is `None`."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    counts, said = found["rows"], []
    if counts["unknown"] or counts["unvisited"]:
        said.append(
            f"{counts['unknown'] + counts['unvisited']} of {counts['dataset']} rows have no score "
            f"({counts['unknown']} were not in the selector's training, {counts['unvisited']} were never visited); "
            f"{counts['kept_without_score']} of them are kept. Train the selector on all rows, for at least one epoch."
        )
    said += _visit_warnings(found["correlations"])
    share = found["effective_fraction"]["all"]
    if share is not None and share < FEW:
        trained = found["method"] == "seal"
        said.append(
            f"The weights amount to {share:.2g} of the rows: a few rows have nearly all of it. Use the ranking "
            "(`keep` or `count`) and not the weights"
            + (", or train the selector with a lower `selector_learning_rate`." if trained else ".")
        )
    for name, agreement in found["agreement"].items():
        if agreement["n"] < counts["scored"] / 2:
            said.append(
                f"{name} has scored only {agreement['n']} of the {counts['scored']} rows. Compare selectors of the "
                "same dataset."
            )
        if agreement["flagged"] and agreement["method"] != "random" and found["method"] != "random":
            said.append(
                f"{name} ranks the rows otherwise (Spearman's rho {agreement['rho']:.2f}, below {AGREEMENT}). Compare "
                "the rows that both put first before relying on either; a selector of another model or seed should "
                "agree."
            )
    return said


def _visit_warnings(correlations: Mapping[str, Any]) -> list[str]:
    said = []
    for name, what, advice in (
        (
            "last_visit_step",
            "the step of a row's last visit",
            "the ranking tells in part when a row was seen and not what it says. Train with `selector_optimizer: sgd` "
            "and without `selector_average`, for more epochs.",
        ),
        (
            "visits",
            "the number of a row's visits",
            "the ranking tells in part how often a row was seen. Train for whole epochs, so that every row is visited "
            "equally often, and remove identical rows.",
        ),
    ):
        rho = (correlations[name] or {}).get("rho")
        if rho is None or abs(rho) <= VISIT_TIME:
            continue
        chance = 1.96 / math.sqrt(correlations[name]["n"] - 1)
        luck = (
            f" (With {correlations[name]['n']} rows chance alone reaches {chance:.2f}; another seed would tell.)"
            if abs(rho) <= chance
            else ""
        )
        said.append(f"The score goes along with {what} (Spearman's rho {rho:.2f}): {advice}{luck}")
    return said
