"""What stands in the columns of a dataset: text, messages, nothing, or what is neither."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from .errors import DataError

SHOWN = 5
"""How many row numbers a message names."""

NEEDED = "text, or a list of messages with `role` and `content`"


def rows_named(numbers: list[int]) -> str:
    """
    Row numbers as a message names them, counted from 0.

    Args:
        numbers (`list[int]`):
            One or more row numbers.

    Returns:
        `str`: such as "row 3" or "7 rows (0, 1, 2, 3, 4, ...)".
    """
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return (
        f"row {shown}"
        if len(numbers) == 1
        else f"{len(numbers)} rows ({shown}{', ...' if len(numbers) > SHOWN else ''})"
    )


def _strange(value: Any) -> str | None:
    """What a cell is, if it is neither text nor messages nor null."""
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, dict):
        return f"a mapping with the keys {sorted(value)}"
    if not isinstance(value, list):
        return f"a value of type {type(value).__name__}"
    for message in value:
        if not isinstance(message, dict):
            return f"a list of {type(message).__name__}"
        if "from" in message and "value" in message:
            return "messages with `from` and `value`"
        if not isinstance(message.get("role"), str):
            return "a message without a `role`"
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return "a message without a `content`" if content is None else "a message whose `content` is not text"
    return None


def _mend(found: str) -> str:
    if "`from`" in found:
        return (
            "Rename the keys `from` and `value` to `role` and `content`, and the roles `human` and `gpt` to `user` "
            "and `assistant`."
        )
    return "Convert or remove these values." if "message" not in found else "Complete or remove these messages."


def check_cells(dataset: Dataset, name: str, columns: tuple[str, ...], *, one_kind: bool = True) -> None:
    """
    Refuses cells that are neither text nor messages, and columns of both kinds.

    Args:
        dataset ([`~datasets.Dataset`]):
            Any dataset.
        name (`str`):
            What messages call it.
        columns (`tuple[str]`):
            Columns to look at, as far as there are any of that name.
        one_kind (`bool`, *optional*, defaults to `True`):
            Whether all of them must be of one kind.

    Raises:
        [`DataError`]: naming columns, row numbers and what stands there. Null and empty cells are left to others.
    """
    strange: dict[tuple[str, str], list[int]] = {}
    first: dict[str, tuple[str, int]] = {}
    for column in columns:
        for number, value in enumerate(dataset[column] if column in dataset.column_names else []):
            if (found := _strange(value)) is not None:
                strange.setdefault((column, found), []).append(number)
            elif value:
                first.setdefault("text" if isinstance(value, str) else "messages", (column, number))
    if strange:
        found = "; ".join(f"`{column}` is {what} in {rows_named(rows)}" for (column, what), rows in strange.items())
        mends = " ".join(dict.fromkeys(_mend(what) for _, what in strange))
        raise DataError(f"The {name} dataset needs {NEEDED}, in every cell: {found}. {mends}")
    if one_kind and len(first) > 1:
        places = " and ".join(f"{kind} in `{column}` (row {row})" for kind, (column, row) in first.items())
        raise DataError(
            f"The {name} dataset has {places}; all columns and rows must be of one kind. Write all of them as text, "
            "or all as messages (`chat_format: true` makes messages of text)."
        )


def check_full(dataset: Dataset, name: str) -> None:
    """
    Refuses null and empty cells, those of all columns in one message.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data whose cells are text or messages.
        name (`str`):
            What messages call it.

    Raises:
        [`DataError`]: naming columns and row numbers.
    """
    found = []
    for column in ("prompt", "chosen", "completion", "rejected", "text", "messages", "forget", "retain"):
        values = dataset[column][:] if column in dataset.column_names else []
        shown = "chosen/completion" if column in ("chosen", "completion") else column
        if null := [number for number, value in enumerate(values) if value is None]:
            found.append(f"a null `{shown}` in {rows_named(null)}")
        # Of a conversation the last turn counts: a system prompt does not make an empty request a full one.
        whole = column == "messages"
        empty = [
            number
            for number, value in enumerate(values)
            if value is not None and not (value if whole else _last_text(value).strip())
        ]
        if empty:
            found.append(f"an empty `{shown}` in {rows_named(empty)}")
    if found:
        raise DataError(
            f"The {name} dataset has {', and '.join(found)}. There is nothing to train on there; fill or remove these "
            "rows."
        )


def _last_text(value: str | list[dict]) -> str:
    """Text, or that of a conversation's last turn."""
    if isinstance(value, str):
        return value
    return str(value[-1].get("content") or "") if value else ""
