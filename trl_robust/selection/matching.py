"""What a selector needs to know of a dataset: how many rows are kept, of which source, and what is not scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from datasets import Dataset

from ..data.cells import rows_named
from ..data.errors import DataError

Unscored = Literal["refuse", "drop", "keep"]

Ranked = tuple[float, str, int]
"""Minus the score, hash and number of a row: sorted, the best row is first."""


@dataclass(frozen=True)
class Selection:
    """
    Which rows of a dataset are kept, and how it was decided.

    Args:
        kept (`list[int]`):
            Numbers of the rows that are kept, in the dataset's order.
        threshold (`float`, *optional*):
            Weight of the last row that was kept by its score.
        tied (`int`):
            Rows whose score equals that row's, kept or not.
        unknown (`list[int]`):
            Rows that the selector was not trained on.
        unvisited (`list[int]`):
            Rows that it knows, and that no update has seen.
        missing (`int`):
            Rows that it knows, and that the dataset lacks; identical ones count once.
    """

    kept: list[int]
    threshold: float | None
    tied: int
    unknown: list[int]
    unvisited: list[int]
    missing: int


def amount_faults(keep: float | None, count: int | None, threshold: float | None) -> list[str]:
    """
    What is wrong with the amount of rows to keep.

    Args:
        keep (`float`, *optional*):
            Share of the rows.
        count (`int`, *optional*):
            Number of rows.
        threshold (`float`, *optional*):
            Least weight.

    Returns:
        `list[str]`: one entry for each fault.
    """
    faults = []
    if count is not None and threshold is not None:
        faults.append("`count` and `threshold` are both given. Keep one.")
    if keep is not None and not 0 <= keep <= 1:
        faults.append(f"`keep` is {keep}; it is a share, from 0 to 1.")
    if count is not None and count < 0:
        faults.append(f"`count` is {count}; it must be at least 0.")
    if threshold is not None and not math.isfinite(threshold):
        faults.append(f"`threshold` is {threshold}; it must be a finite number.")
    return faults


def check_amount(keep: float, count: int | None, threshold: float | None, unscored: Unscored) -> None:
    """
    Refuses an amount that cannot be.

    Args:
        keep, count, threshold:
            As for [`amount_faults`].
        unscored (`str`):
            What becomes of rows without a score.

    Raises:
        `ValueError`: naming every fault, one a line.
    """
    faults = amount_faults(keep, count, threshold)
    if unscored not in get_args(Unscored):
        faults.append(f"`unscored` is {unscored!r}; it is one of {list(get_args(Unscored))}.")
    if faults:
        raise ValueError("\n".join(faults))


def amount_kept(keep: float, count: int | None, rows: int) -> int:
    """
    How many of some rows are kept.

    Args:
        keep (`float`):
            Share of them.
        count (`int`, *optional*):
            Number of them, in place of a share.
        rows (`int`):
            How many there are.

    Returns:
        `int`: the share rounded down, or the count.
    """
    # 0.29 of 100 is 28.999... in floating point, and 29 rows.
    return math.floor(keep * rows + 1e-9) if count is None else count


def by_source(dataset: Dataset, column: str | None, ranked: list[Ranked]) -> list[list[Ranked]]:
    """
    Ranked rows, in one group, or in one for every source.

    Args:
        dataset ([`~datasets.Dataset`]):
            Their dataset.
        column (`str`, *optional*):
            Column that names the sources.
        ranked (`list`):
            Rows, the best first.

    Returns:
        `list`: groups, each in the order of `ranked`.

    Raises:
        [`DataError`]: no such column.
    """
    if column is None:
        return [ranked]
    if column not in dataset.column_names:
        raise DataError(f"The dataset has no column {column!r} to select by; it has {dataset.column_names}.")
    sources = dataset[column][:]
    groups: dict[str, list[Ranked]] = {}
    for entry in ranked:
        groups.setdefault(str(sources[entry[2]]), []).append(entry)
    return list(groups.values())


def unscored_rows(rows: int, unknown: list[int], unvisited: list[int]) -> str:
    """
    Why a dataset is refused.

    Args:
        rows (`int`):
            How many it has.
        unknown (`list[int]`):
            Those that the selector does not know.
        unvisited (`list[int]`):
            Those that no update has seen.

    Returns:
        `str`: with their numbers.
    """
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} of its {rows} rows were not scored by this selector ({rows_named(unknown)})")
    if unvisited:
        parts.append(f"{len(unvisited)} were never visited in its training ({rows_named(unvisited)})")
    return (
        f"The dataset does not fit the selector: {', and '.join(parts)}. Select from the dataset that it was trained "
        "on, or say what becomes of such rows with `unscored` (`drop` or `keep`)."
    )
