from __future__ import annotations

import math

from datasets import Dataset

from .cells import rows_named
from .errors import DataError

WEIGHT = "weight"
"""Column with the weight of every row's loss, where there is one."""


def refuse_row_weights(dataset: Dataset, name: str) -> None:
    """
    Refuses weights where they would be left out without a word.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows, with or without a column `weight`.
        name (`str`):
            What messages call the dataset.

    Raises:
        [`DataError`]: it has the column.
    """
    if WEIGHT in dataset.column_names:
        raise DataError(
            f"The {name} dataset has a column `{WEIGHT}`, and only lat-sft, lap-sft and SFT weigh rows. Remove or "
            "rename it."
        )


def check_row_weights(dataset: Dataset, name: str) -> None:
    """
    Refuses a column `weight` that cannot weigh.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows, with or without such a column.
        name (`str`):
            What messages call the dataset.

    Raises:
        [`DataError`]: naming the rows whose weight is no number, not finite or below 0; or all weights are 0.
    """
    if WEIGHT not in dataset.column_names:
        return
    weights = dataset[WEIGHT][:]
    wrong = [
        number
        for number, weight in enumerate(weights)
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0
    ]
    if wrong:
        raise DataError(
            f"The {name} dataset has a column `{WEIGHT}`, and it is no number of at least 0 in {rows_named(wrong)}. "
            "(A negative weight would train on a row by gradient ascent.) Correct these rows, or rename the column."
        )
    if not any(weights):
        raise DataError(f"The {name} dataset has a `{WEIGHT}` of 0 in every row; nothing would be trained.")
