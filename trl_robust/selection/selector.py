"""A selector as it is saved and applied: scores of rows that are known by what they say."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.cells import rows_named
from ..data.errors import DataError
from ..data.hashing import row_hashes
from ..data.row_weights import WEIGHT
from .functions import SelectorFunction, check_function, row_weights

SCHEMA = 1
TENSORS, SETTINGS, ROWS = "selector.safetensors", "selector.json", "rows.parquet"

Unscored = Literal["refuse", "drop", "keep"]


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
            Rows that it knows, and that the dataset lacks.
    """

    kept: list[int]
    threshold: float | None
    tied: int
    unknown: list[int]
    unvisited: list[int]
    missing: int


@dataclass
class Selector:
    """
    Scores of the rows of one dataset, which any copy of it can be selected by: in any order, for any model.

    Args:
        logits (`torch.Tensor` of shape `(N,)`):
            One number a row; the higher, the sooner it is kept.
        row_hashes (`list[str]`):
            Hashes of the N rows, as [`~trl_robust.data.hashing.row_hash`] makes them. Identical rows share a hash, and
            the mean of their logits is the score of each.
        function (`str`, *optional*, defaults to `"softmax"`):
            From logits to weights ([`~trl_robust.selection.row_weights`]).
        normalized (`bool`, *optional*, defaults to `True`):
            Whether weights are divided by their mean in training; those of [`weights`] always are.
        statistics (`dict[str, torch.Tensor]`, *optional*):
            What was seen of every row, each of shape `(N,)`: `visits`, `last_visit_step` (-1: never), `first_loss`,
            `ema_loss`, `ema_loss_aux` (nan: none), `length` (tokens trained on).
        settings (`dict`, *optional*):
            How the scores came about; plain values.

    Raises:
        `ValueError`: numbers of rows that differ, an unknown function, or a score that is not a number.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_robust.data.hashing import row_hashes

    >>> rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]})
    >>> selector = Selector(torch.tensor([0.1, 0.3, 0.2]), row_hashes(rows))
    >>> selector.select(rows.select([2, 1, 0]), keep=0.7)["prompt"][:]
    ['c', 'b']
    ```
    """

    logits: torch.Tensor
    row_hashes: list[str]
    function: SelectorFunction = "softmax"
    normalized: bool = True
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_function(self.function)
        self.logits = self.logits.detach().to("cpu", torch.float64)
        wrong = {name: len(values) for name, values in self.statistics.items() if len(values) != len(self.logits)}
        if len(self.row_hashes) != len(self.logits) or wrong:
            raise ValueError(
                f"A selector of {len(self.logits)} logits has {len(self.row_hashes)} row hashes"
                + (f", and statistics of other lengths: {wrong}" if wrong else "")
                + ". It needs one of each a row."
            )
        if strange := (~self.logits.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"The selector's score is not a finite number in {rows_named(strange)}; nothing can be ranked."
            )
        self._place: dict[str, int] = {}
        for number, name in enumerate(self.row_hashes):
            self._place.setdefault(name, number)

    def weights(self) -> torch.Tensor:
        """
        Weights of the rows; none is negative.

        Returns:
            `torch.Tensor` of shape `(N,)`, float64, of mean 1.
        """
        return row_weights(self.scores, self.function, normalized=True)

    @property
    def scores(self) -> torch.Tensor:
        """Scores of the rows, `(N,)`, float64: their logits; identical rows share the mean of theirs."""
        first = torch.tensor([self._place[name] for name in self.row_hashes])
        sums = torch.zeros_like(self.logits).index_add_(0, first, self.logits)
        counts = torch.bincount(first, minlength=len(first))
        # Rows that are alone keep their logit to the last bit.
        return torch.where(counts[first] == 1, self.logits, sums[first] / counts[first])

    @property
    def fingerprint(self) -> str:
        """Hash of the rows that were scored, in whatever order: SHA-256, hexadecimal."""
        return hashlib.sha256("\n".join(sorted(self.row_hashes)).encode()).hexdigest()

    def select(
        self,
        dataset: Dataset,
        keep: float = 0.8,
        *,
        count: int | None = None,
        threshold: float | None = None,
        weighted: bool = False,
        source_column: str | None = None,
        unscored: Unscored = "refuse",
    ) -> Dataset:
        """
        The rows to keep of a copy of the dataset that was scored.

        Args:
            dataset ([`~datasets.Dataset`]):
                Any copy: rows are found by what they say.
            keep (`float`, *optional*, defaults to `0.8`):
                Share of its rows; rounded down. 1 keeps all of them.
            count (`int`, *optional*):
                So many rows, in place of a share.
            threshold (`float`, *optional*):
                All rows of at least this weight, in place of a share.
            weighted (`bool`, *optional*, defaults to `False`):
                Whether a column `weight` is added, whose mean is 1.
            source_column (`str`, *optional*):
                Column whose every value is selected from by itself, with the same share or count.
            unscored (`str`, *optional*, defaults to `"refuse"`):
                Rows that the selector does not know, or that no update has seen: `"refuse"` the dataset, `"drop"` or
                `"keep"` them.

        Returns:
            [`~datasets.Dataset`]: kept rows in the order they had. Of rows with equal scores, those with the smaller
            hash come first, and of identical ones the earlier.

        Raises:
            [`~trl_robust.data.DataError`]: rows that are not scored, with their number; an unknown column.
            `ValueError`: a share, count or threshold that cannot be.
        """
        chosen = self.selection(
            dataset, keep, count=count, threshold=threshold, source_column=source_column, unscored=unscored
        )
        rows = dataset.select(chosen.kept)
        if not weighted:
            return rows
        if WEIGHT in rows.column_names:
            raise DataError(f"The dataset has a column `{WEIGHT}` already. Remove or rename it.")
        own, weights = self._lookup(row_hashes(rows)), self.weights()
        found = torch.tensor([1.0 if place is None else weights[place].item() for place in own])
        return rows.add_column(WEIGHT, (found / found.mean()).tolist())

    def selection(
        self,
        dataset: Dataset,
        keep: float = 0.8,
        *,
        count: int | None = None,
        threshold: float | None = None,
        source_column: str | None = None,
        unscored: Unscored = "refuse",
    ) -> Selection:
        """
        Which rows [`select`] keeps, by their numbers; see there for the arguments.

        Returns:
            [`Selection`].
        """
        _check_amount(keep, count, threshold)
        hashes = row_hashes(dataset)
        places = self._lookup(hashes)
        unknown = [number for number, place in enumerate(places) if place is None]
        visited = self._visited()
        unvisited = [number for number, place in enumerate(places) if place is not None and not visited[place]]
        if unscored == "refuse" and (unknown or unvisited):
            raise DataError(_unscored(len(dataset), unknown, unvisited))
        left_out = {*unknown, *unvisited}
        scores, weights = self.scores, self.weights()
        ranked = sorted(
            (-scores[place].item(), hashes[number], number)
            for number, place in enumerate(places)
            if place is not None and number not in left_out
        )
        kept = set(left_out) if unscored == "keep" else set()
        chosen: list[tuple[float, str, int]] = []
        for group in _by_source(dataset, source_column, ranked):
            if threshold is not None:
                chosen += [entry for entry in group if weights[places[entry[2]]] >= threshold]  # type: ignore[index]
            else:
                # 0.29 of 100 is 28.999... in floating point, and 29 rows.
                chosen += group[: math.floor(keep * len(group) + 1e-9) if count is None else count]
        kept |= {number for _, _, number in chosen}
        last = max(chosen, default=None)
        return Selection(
            kept=sorted(kept),
            threshold=None if last is None else weights[places[last[2]]].item(),  # type: ignore[index]
            tied=0 if last is None else sum(entry[0] == last[0] for entry in ranked),
            unknown=unknown,
            unvisited=unvisited,
            missing=len(self._place.keys() - set(hashes)),
        )

    def _lookup(self, hashes: Sequence[str]) -> list[int | None]:
        return [self._place.get(name) for name in hashes]

    def _visited(self) -> torch.Tensor:
        visits = self.statistics.get("visits")
        if visits is None:
            return torch.ones(len(self.logits), dtype=torch.bool)
        first = torch.tensor([self._place[name] for name in self.row_hashes])
        return torch.zeros_like(visits).index_add_(0, first, visits)[first] > 0

    def save(self, folder: str | Path) -> None:
        """
        Writes `selector.safetensors`, `rows.parquet` and, last, `selector.json`.

        Args:
            folder (`str` or `Path`):
                Where; made if missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{TENSORS}.partial"
        tensors = {"omega": self.logits, **self.statistics}
        save_file({name: values.detach().cpu().contiguous() for name, values in tensors.items()}, draft)
        draft.replace(folder / TENSORS)
        table = {
            "row": list(range(len(self.logits))),
            "hash": self.row_hashes,
            "score": self.scores.tolist(),
            "weight": self.weights().tolist(),
            **{name: values.tolist() for name, values in self.statistics.items()},
        }
        draft = folder / f".{ROWS}.partial"
        pq.write_table(pa.table(table), draft)
        draft.replace(folder / ROWS)
        about = {
            "schema": SCHEMA,
            "function": self.function,
            "normalized": self.normalized,
            "rows": len(self.logits),
            "dataset_fingerprint": self.fingerprint,
            "rows_file": ROWS,
            "settings": self.settings,
        }
        draft = folder / f".{SETTINGS}.partial"
        draft.write_text(json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(folder / SETTINGS)

    @classmethod
    def load(cls, folder: str | Path) -> Selector:
        """
        Reads what [`save`] wrote.

        Args:
            folder (`str` or `Path`):
                A selector's folder.

        Returns:
            [`Selector`].

        Raises:
            [`~trl_robust.data.DataError`]: there is none, or its files cannot be read or do not belong together.
        """
        folder = Path(folder)
        if missing := [name for name in (SETTINGS, TENSORS, ROWS) if not (folder / name).is_file()]:
            raise DataError(
                f"{folder} holds no selector: {', '.join(missing)} is not there. Name a folder that `trl-robust seal` "
                "or `Selector.save` has written."
            )
        try:
            about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if about["schema"] != SCHEMA:
                raise DataError(
                    f"The selector in {folder} has schema {about['schema']}, and this version reads {SCHEMA}. Use the "
                    "version of trl-robust that wrote it."
                )
            tensors = load_file(folder / TENSORS)
            hashes = pq.read_table(folder / ROWS, columns=["hash"])["hash"].to_pylist()
            found = cls(
                logits=tensors.pop("omega"),
                row_hashes=hashes,
                function=about["function"],
                normalized=about["normalized"],
                statistics=tensors,
                settings=about["settings"],
            )
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, OSError, SafetensorError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"The selector in {folder} cannot be read: {reason or type(error).__name__}") from error
        if found.fingerprint != about["dataset_fingerprint"]:
            raise DataError(
                f"The selector in {folder} is not whole: {ROWS} and {SETTINGS} are of different rows. Copy the folder "
                "again."
            )
        return found


def _check_amount(keep: float, count: int | None, threshold: float | None) -> None:
    if count is not None and threshold is not None:
        raise ValueError("`count` and `threshold` are both given. Keep one.")
    if not 0 <= keep <= 1:
        raise ValueError(f"`keep` is {keep}; it is a share, from 0 to 1.")
    if count is not None and count < 0:
        raise ValueError(f"`count` is {count}; it must be at least 0.")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"`threshold` is {threshold}; it must be a number.")


def _by_source(dataset: Dataset, column: str | None, ranked: list[tuple[float, str, int]]) -> list[list[Any]]:
    """Ranked rows, in one group, or in one for every source."""
    if column is None:
        return [ranked]
    if column not in dataset.column_names:
        raise DataError(f"The dataset has no column {column!r} to select by; it has {dataset.column_names}.")
    sources, groups = dataset[column][:], {}  # type: ignore[var-annotated]
    for entry in ranked:
        groups.setdefault(str(sources[entry[2]]), []).append(entry)
    return list(groups.values())


def _unscored(rows: int, unknown: list[int], unvisited: list[int]) -> str:
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} of its {rows} rows were not scored by this selector ({rows_named(unknown)})")
    if unvisited:
        parts.append(f"{len(unvisited)} were never visited in its training ({rows_named(unvisited)})")
    return (
        f"The dataset does not fit the selector: {', and '.join(parts)}. Select from the dataset that it was trained "
        "on, or say what becomes of such rows with `unscored` (`drop` or `keep`)."
    )
