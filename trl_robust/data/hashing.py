"""Rows that are known by what they say: ids that survive any preparation, order and copy of a dataset."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Any

from datasets import Dataset

from .cells import check_cells
from .errors import DataError
from .preference import prompt_inside, take_prompt_out

ROW_HASH = "row_hash"
"""Column with the hash of every row, where there is one."""
CONTENTS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
"""Columns that count; all others may differ."""


def row_hash(row: dict[str, Any]) -> str:
    """
    Hash of what a row says, whatever else stands beside it.

    Plain text counts as a message (`prompt` as the user's, the completions as the assistant's), so that a row has one
    hash in both forms. Texts are compared in Unicode's normal form C, with line ends as `\\n` and without white space
    around them.

    Args:
        row (`dict`):
            A row with some of the columns `prompt`, `completion`, `chosen`, `rejected`, `messages` and `text`.

    Returns:
        `str`: SHA-256, hexadecimal.

    Example:

    ```python
    >>> plain = row_hash({"prompt": "Hi", "completion": "Hello"})
    >>> plain == row_hash({"prompt": [{"role": "user", "content": "Hi "}], "completion": "Hello", "source": "x"})
    True
    ```
    """
    said = {column: _messages(row[column], column) for column in CONTENTS if row.get(column) is not None}
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def _messages(value: Any, column: str) -> list[list[str]] | str:
    if isinstance(value, str):
        if column == "text":
            return _normal(value)
        return [["user" if column == "prompt" else "assistant", _normal(value)]]
    return [_turn(turn) for turn in value]


def _turn(turn: dict[str, Any]) -> list[str]:
    parts = [turn.get("content")]
    if turn.get("tool_calls"):
        parts.append(turn["tool_calls"])
    # What is no text (images, tool calls) is compared as it is written.
    texts = (part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str) for part in parts)
    return [str(turn["role"]), *map(_normal, texts)]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()


def row_hashes(dataset: Dataset) -> list[str]:
    """
    Hashes of all rows of a dataset: its column `row_hash`, or computed.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompt-completion, preference or language-modelling data.

    Returns:
        `list[str]`: see [`row_hash`].

    Raises:
        [`DataError`]: no column that says anything, or cells that are neither text nor messages.
    """
    if ROW_HASH in dataset.column_names:
        hashes = dataset[ROW_HASH][:]
        if not all(isinstance(value, str) for value in hashes):
            raise DataError(
                f"The dataset has a column `{ROW_HASH}` that is no text in every row. Remove or rename it."
            )
        return hashes
    check_cells(dataset, "training", CONTENTS, one_kind=False)
    if prompt_inside(dataset):
        dataset = take_prompt_out(dataset, "training")
    elif {"completion", "rejected"} <= set(dataset.column_names) and "chosen" not in dataset.column_names:
        # As the trainers have pairs after checking them.
        dataset = dataset.rename_column("completion", "chosen")
    columns = [column for column in CONTENTS if column in dataset.column_names]
    if not columns:
        raise DataError(
            f"The dataset has the columns {dataset.column_names}; rows are known by `prompt` and `completion` (or "
            "`chosen` and `rejected`, `messages`, `text`). Rename its columns."
        )
    return [row_hash(row) for row in dataset.select_columns(columns)]


def add_row_hashes(dataset: Dataset) -> Dataset:
    """
    Adds the column `row_hash`, which stays with a row through tokenisation, filtering, truncation and shuffling.

    Args:
        dataset ([`~datasets.Dataset`]):
            As for [`row_hashes`].

    Returns:
        [`~datasets.Dataset`].
    """
    hashes = row_hashes(dataset)
    return dataset if ROW_HASH in dataset.column_names else dataset.add_column(ROW_HASH, hashes)
