"""Rows for unlearning: texts to forget beside texts to retain, and generic labels for the tokens of a text."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from .cells import rows_named
from .errors import DataError


def pair_corpora(forget: Dataset, retain: Dataset, *, seed: int = 0) -> Dataset:
    """
    Gives every text to forget a text to retain, in random order, all of them before any comes a second time.

    Empty texts are left out of both (the usual retain corpora have an empty line between paragraphs).

    Args:
        forget ([`~datasets.Dataset`]):
            Texts to forget in the column `text`; the column `topic` stays beside them.
        retain ([`~datasets.Dataset`]):
            Texts to retain in the column `text`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        [`~datasets.Dataset`] with `forget`, `retain` and, if it was there, `topic`: one row for every text to forget.

    Raises:
        [`DataError`]: a corpus without the column, or without a text in it.

    Example:

    ```python
    >>> forget = Dataset.from_dict({"text": ["a secret", ""]})
    >>> pair_corpora(forget, Dataset.from_dict({"text": ["plain talk"]}))[0]
    {'forget': 'a secret', 'retain': 'plain talk'}
    ```
    """
    texts = {name: _texts(corpus, name) for name, corpus in (("forget", forget), ("retain", retain))}
    kept = [number for number, text in enumerate(texts["forget"]) if text.strip()]
    retained = [text for text in texts["retain"] if text.strip()]
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(retained), generator=generator) for _ in range(-(-len(kept) // len(retained)))]
    order = torch.cat(rounds)[: len(kept)].tolist()
    columns: dict[str, list[Any]] = {
        "forget": [texts["forget"][number] for number in kept],
        "retain": [retained[number] for number in order],
    }
    if "topic" in forget.column_names:
        topics = forget["topic"][:]
        columns["topic"] = [str(topics[number]) for number in kept]
    return Dataset.from_dict(columns)


def _texts(corpus: Dataset, name: str) -> list[str]:
    if "text" not in corpus.column_names:
        raise DataError(
            f"The {name} corpus has the columns {corpus.column_names}; a column `text` is needed. Rename the one that "
            "holds the texts."
        )
    texts = corpus["text"][:]
    if strange := [number for number, text in enumerate(texts) if not isinstance(text, str | None)]:
        raise DataError(f"The {name} corpus has a `text` that is no text in {rows_named(strange)}. Convert it.")
    if not any(text and text.strip() for text in texts):
        raise DataError(f"The {name} corpus has no text that is not empty.")
    return [text or "" for text in texts]


def is_corpus_pairs(dataset: Dataset) -> bool:
    """Whether rows hold a text to forget and one to retain."""
    return {"forget", "retain"} <= set(dataset.column_names)


def is_generic_labels(dataset: Dataset) -> bool:
    """Whether rows hold tokens and a generic label for each."""
    return {"tokens", "labels"} <= set(dataset.column_names)


def check_generic_labels(dataset: Dataset, name: str) -> None:
    """
    Refuses rows whose tokens and labels do not belong together.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of `tokens` and `labels`.
        name (`str`):
            What messages call it.

    Raises:
        [`DataError`]: naming the rows.
    """
    wrong = []
    for number, (tokens, labels) in enumerate(zip(dataset["tokens"], dataset["labels"], strict=True)):
        fits = isinstance(tokens, list) and isinstance(labels, list) and len(tokens) == len(labels) >= 2
        if not (fits and all(isinstance(token, int) for token in (*tokens, *labels))):
            wrong.append(number)
    if wrong:
        raise DataError(
            f"The {name} dataset has generic labels, and `tokens` and `labels` are no lists of whole numbers of the "
            f"same length (at least 2) in {rows_named(wrong)}. Correct or remove these rows."
        )


def generic_label_rows(dataset: Dataset, max_length: int | None) -> Dataset:
    """
    Tokens with generic labels as the trainers take them: the generic label is wanted, the token itself is not.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of `tokens` and `labels`; label `i` stands for token `i`, and the first is left out, since nothing
            comes before it.
        max_length (`int`, *optional*):
            Longer rows are cut.

    Returns:
        [`~datasets.Dataset`] with `input_ids`, `labels`, `away_input_ids` and `away_labels`.
    """

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        tokens = row["tokens"][:max_length]
        return {
            "input_ids": tokens,
            "labels": [-100, *row["labels"][1:max_length]],
            "away_input_ids": tokens,
            "away_labels": [-100, *tokens[1:]],
        }

    return dataset.map(cut, remove_columns=dataset.column_names, desc="Reading generic labels")
