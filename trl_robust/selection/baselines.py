"""Simpler ways to choose rows, which a learned selector has to beat (seal.md 12).

What is random about them hangs on what a row says, not on where it stands: a row is kept or not whatever its dataset's
order, and a hash tells rows apart in the same way on every machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets

from ..data.errors import DataError
from ..data.hashing import CONTENTS, ROW_HASH, row_hashes
from ..data.row_weights import WEIGHT
from .selector import Selector

WORDS = re.compile(r"\w+|[^\w\s]+")
"""Words and runs of punctuation, as DSIR's reference code splits text."""
MIXED_SHARE = 0.03
"""Share of safety demonstrations at which 2309.07875 sees most of the gain, and few needless refusals."""
SMOOTHING = 1.0
"""N-grams' worth of the pooled distribution that is added to the target's and to the raw one."""


def none_selector(hashes: Sequence[str]) -> Selector:
    """
    The selector without an opinion: every row has the same score and the weight 1.

    Args:
        hashes (sequence of `str`):
            Rows, as [`~trl_robust.data.hashing.row_hashes`] gives them.

    Returns:
        [`Selector`].
    """
    return _selector(hashes, np.zeros(len(hashes)), {"method": "none"})


def random_selector(hashes: Sequence[str], seed: int) -> Selector:
    """
    A random score for every row, between 0 and 1: what training on fewer rows does by itself.

    Args:
        hashes (sequence of `str`):
            Rows, as [`~trl_robust.data.hashing.row_hashes`] gives them. Identical rows have one score.
        seed (`int`):
            Seed.

    Returns:
        [`Selector`].

    Example:

    ```python
    >>> one, other = random_selector(["a", "b", "c"], seed=1), random_selector(["c", "a", "b"], seed=1)
    >>> one.logits[[2, 0, 1]].equal(other.logits)
    True
    ```
    """
    return _selector(hashes, _uniform(hashes, "random", seed), {"method": "random", "seed": seed})


def dsir_selector(
    dataset: Dataset, safe_dataset: Dataset, *, buckets: int = 10_000, ngrams: int = 2, seed: int = 0
) -> Selector:
    """
    DSIR (2302.03169): rows that are more likely in the safe set than in the dataset, by the n-grams of their text.

    The text of a row is what it trains on, prompt included and `rejected` left out. Its n-grams are hashed into
    buckets; the log importance weight of a row is the sum over its n-grams of `log p(safe) - log p(dataset)`. Gumbel
    noise makes the highest scores a draw without replacement in proportion to these weights.

    A sum over n-grams grows with the length of a text, so that the weights themselves lie many powers of ten apart:
    the scores are for ranking, not for `weighted`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to choose from, in any of the forms that have a row hash.
        safe_dataset ([`~datasets.Dataset`]):
            Rows to resemble.
        buckets (`int`, *optional*, defaults to `10_000`):
            Number of buckets, as in the paper.
        ngrams (`int`, *optional*, defaults to `2`):
            Longest n-gram; the paper counts single words and pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise.

    Returns:
        [`Selector`].

    Raises:
        [`~trl_robust.data.DataError`]: a dataset that says nothing.
        `ValueError`: `buckets` or `ngrams` below 1.
    """
    for name, value in (("buckets", buckets), ("ngrams", ngrams)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    hashes = row_hashes(dataset)
    rows = [_buckets(text, buckets, ngrams) for text in _texts(dataset)]
    raw = _total(rows, buckets)
    target = _total((_buckets(text, buckets, ngrams) for text in _texts(safe_dataset)), buckets)
    for name, total in (("safe", target), ("training", raw)):
        if not total.any():
            raise DataError(f"The {name} dataset has no word in its rows; DSIR compares words. Give one with text.")
    # Towards the same distribution, and not towards an even one: the smaller set, which is smoothed the more, would
    # otherwise seem to like every rare word of the larger one.
    pooled = (target + raw) / (target.sum() + raw.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log((target + SMOOTHING * pooled) / (target.sum() + SMOOTHING))
        ratio -= np.log((raw + SMOOTHING * pooled) / (raw.sum() + SMOOTHING))
    scores = [ratio[row].sum() for row in rows]
    noise = -np.log(-np.log(_uniform(hashes, "dsir", seed)))
    settings = {"method": "dsir", "buckets": buckets, "ngrams": ngrams, "seed": seed, "safe_rows": len(safe_dataset)}
    return _selector(hashes, np.array(scores) + noise, settings)


def mix_rows(
    dataset: Dataset, safe_dataset: Dataset, *, share: float | None = None, count: int | None = None, seed: int = 0
) -> Dataset:
    """
    Appends safety demonstrations to a dataset (Safety-Tuned LLaMAs, 2309.07875).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows to train on.
        safe_dataset ([`~datasets.Dataset`]):
            Demonstrations to draw from, without replacement.
        share (`float`, *optional*):
            How many, as a share of the dataset's rows; rounded up. 0.03 where neither is given.
        count (`int`, *optional*):
            How many, in place of a share.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        [`~datasets.Dataset`]: the rows of the dataset, then the demonstrations in their own order, with the columns
        that both have. A column `weight` of the dataset stays; demonstrations without one weigh 1.

    Raises:
        [`~trl_robust.data.DataError`]: too few demonstrations, with their number, or rows of another form.
        `ValueError`: a share or count that cannot be, or both.
    """
    if share is not None and count is not None:
        raise ValueError("`share` and `count` are both given. Keep one.")
    share = MIXED_SHARE if share is None else share
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share}; it is a share of the dataset's rows, from 0 to 1.")
    if count is not None and count < 0:
        raise ValueError(f"`count` is {count}; it must be at least 0.")
    wanted = math.ceil(share * len(dataset) - 1e-9) if count is None else count
    if wanted > len(safe_dataset):
        raise DataError(
            f"{wanted} safety demonstrations are to be mixed in, and the safe dataset has {len(safe_dataset)} rows. "
            "Lower the share or give more rows; none is used twice."
        )
    said = [[column for column in CONTENTS if column in rows.column_names] for rows in (dataset, safe_dataset)]
    if said[0] != said[1]:
        raise DataError(
            f"Rows of the dataset say something in the columns {said[0]}, those of the safe dataset in {said[1]}. "
            "Give both the same form."
        )
    if wanted == 0:
        return dataset
    hashes = row_hashes(safe_dataset)
    drawn = sorted(np.argsort(_uniform(hashes, "mix", seed), kind="stable")[:wanted].tolist())
    added = safe_dataset.select(drawn)
    if WEIGHT in dataset.column_names and WEIGHT not in added.column_names:
        added = added.add_column(WEIGHT, [1.0] * wanted)
    if ROW_HASH in dataset.column_names and ROW_HASH not in added.column_names:
        added = added.add_column(ROW_HASH, [hashes[number] for number in drawn])
    shared = [column for column in dataset.column_names if column in added.column_names]
    dataset, added = dataset.select_columns(shared), added.select_columns(shared)
    for column in shared:
        if type(dataset.features[column]) is not type(added.features[column]):
            raise DataError(
                f"The column `{column}` is {dataset.features[column]} in the dataset and {added.features[column]} in "
                "the safe dataset. Give both the same form: text, or messages."
            )
    try:
        same = added.features == dataset.features
        return concatenate_datasets([dataset, added if same else added.cast(dataset.features)])
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"The safe dataset's columns cannot be made those of the dataset: {' '.join(str(error).split())}. Give "
            "both the same form."
        ) from error


def _selector(hashes: Sequence[str], logits: np.ndarray, settings: dict[str, Any]) -> Selector:
    return Selector(
        logits=torch.from_numpy(logits),
        row_hashes=list(hashes),
        # No update made these scores; every row counts as seen.
        statistics={"visits": torch.ones(len(hashes), dtype=torch.int64)},
        settings=settings,
    )


def _uniform(hashes: Sequence[str], purpose: str, seed: int) -> np.ndarray:
    """A number strictly between 0 and 1 for every row, from its hash, the purpose and the seed alone."""
    # Without the purpose, DSIR and random selection with one seed would agree where DSIR has nothing to say.
    key = f"{purpose} {seed}".encode()
    whole = (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest()) for name in hashes)
    return np.array([((number >> 12) + 0.5) / 2**52 for number in whole], dtype=np.float64)


def _texts(dataset: Dataset) -> Iterator[str]:
    columns = [column for column in CONTENTS if column in dataset.column_names and column != "rejected"]
    for row in dataset.select_columns(columns):
        yield "\n".join(_text(row[column]) for column in columns if row[column] is not None)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # a message, or a part of one
        return _text(value.get("content") or value.get("text") or "")
    return "\n".join(_text(each) for each in value)


def _buckets(text: str, buckets: int, ngrams: int) -> np.ndarray:
    """Buckets of all n-grams of a text, one as often as it occurs."""
    words = WORDS.findall(text.lower())
    found = [
        _bucket(" ".join(words[start : start + size]), buckets)
        for size in range(1, ngrams + 1)
        for start in range(len(words) - size + 1)
    ]
    return np.array(found, dtype=np.int64)


@lru_cache(maxsize=2**18)  # most n-grams of a corpus are a few that come again and again
def _bucket(ngram: str, buckets: int) -> int:
    # Python's own hash differs from process to process.
    digest = hashlib.blake2b(ngram.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % buckets


def _total(rows: Iterable[np.ndarray], buckets: int) -> np.ndarray:
    total = np.zeros(buckets)
    for row in rows:
        np.add.at(total, row, 1)
    return total
