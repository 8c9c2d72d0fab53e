"""Cases with several wordings, read from a dataset of RobustAlpacaEval's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..data.cells import rows_named
from ..data.errors import DataError

COLUMNS = ("instruction", "paraphrases")
"""What a dataset of cases must have."""


@dataclass(frozen=True)
class Case:
    """
    One question in several wordings.

    Args:
        id (`str`):
            Its `index`, or the number of its row.
        question (`str`):
            The original wording, which every judge sees.
        paraphrases (`tuple[str, ...]`):
            The other wordings.
        answer (`str`, *optional*):
            What a right response states, for the exact judge.
        reference (`str`, *optional*):
            The baseline's answer to the original wording, for judges of preference.
    """

    id: str
    question: str
    paraphrases: tuple[str, ...]
    answer: str | None = None
    reference: str | None = None

    @property
    def wordings(self) -> tuple[str, ...]:
        """All wordings, number 0 the original."""
        return (self.question, *self.paraphrases)


def cases_of(dataset: Dataset, name: str, references: Mapping[str, str] | None = None) -> list[Case]:
    """
    Cases of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `instruction` (text), `paraphrases` (a list of texts; in a CSV file a JSON list) and, optionally,
            `index`, `answer` and `reference`.
        name (`str`):
            What messages call it.
        references (`Mapping[str, str]`, *optional*):
            Baseline answers by instruction, for cases without a `reference`.

    Returns:
        `list` of [`Case`].

    Raises:
        [`DataError`]: a column is missing, or a row is no case; naming the rows.
    """
    if missing := [column for column in COLUMNS if column not in dataset.column_names]:
        raise DataError(
            f"{name} has no column {' and '.join(map(repr, missing))} but {dataset.column_names}. A case needs "
            "`instruction`, the original question, and `paraphrases`, a list of its other wordings."
        )
    found: list[Case] = []
    faults: dict[str, list[int]] = {}
    for number, row in enumerate(dataset):
        paraphrases = _list_of(row["paraphrases"])
        answer, reference = (_text_of(row.get(column)) for column in ("answer", "reference"))
        if not _is_text(row["instruction"]):
            faults.setdefault("an `instruction` that is no text, or empty", []).append(number)
        elif not paraphrases or not all(map(_is_text, paraphrases)):
            faults.setdefault("`paraphrases` that are no list of texts, or empty", []).append(number)
        elif not isinstance(answer, str | None) or not isinstance(reference, str | None):
            faults.setdefault("an `answer` or `reference` that is no text", []).append(number)
        else:
            reference = reference or (references or {}).get(row["instruction"])
            index = row.get("index")
            identity = str(number if index is None else index)
            found.append(Case(identity, row["instruction"], tuple(paraphrases), answer, reference))
    if faults:
        named = "; ".join(f"{what} in {rows_named(rows)}" for what, rows in faults.items())
        raise DataError(f"{name} has {named}. Correct or remove these rows.")
    if len({case.id for case in found}) < len(found):
        raise DataError(f"{name} has an `index` twice. Give every case its own, or leave the column out.")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _list_of(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return value if isinstance(value, list) else None


def _text_of(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
