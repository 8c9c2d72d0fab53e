"""A selector as it is saved and applied: scores of rows that are known by what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..data.cells import rows_named
from ..data.errors import DataError
from ..data.hashing import row_hashes
from ..data.row_weights import WEIGHT
from .functions import SelectorFunction, check_function, row_weights
from .matching import Selection, Unscored, amount_kept, by_source, check_amount, unscored_rows

SCHEMA = 1
TENSORS, SETTINGS, ROWS = "selector.safetensors", "selector.json", "rows.parquet"


@dataclass(eq=False)  # of tensors there is no one answer
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
        if self.logits.ndim != 1 or len(self.logits) == 0:
            raise ValueError(
                f"A selector needs one logit a row, and at least one; its logits have the shape "
                f"{tuple(self.logits.shape)}."
            )
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
                Share of its rows that are scored; rounded down. 1 keeps all of them.
            count (`int`, *optional*):
                So many of them, in place of a share; all of them if there are fewer.
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
            [`~trl_robust.data.DataError`]: rows that are not scored, with their number; an unknown column; with
            `weighted`, a column `weight` that is there already.
            `ValueError`: a share, count, threshold or `unscored` that cannot be.
        """
        hashes = row_hashes(dataset)
        chosen = self._selection(dataset, hashes, keep, count, threshold, source_column, unscored)
        rows = dataset.select(chosen.kept)
        if not weighted:
            return rows
        if WEIGHT in rows.column_names:
            raise DataError(f"The dataset has a column `{WEIGHT}` already. Remove or rename it.")
        places, weights = self._lookup(hashes), self.weights().tolist()
        kept = (places[number] for number in chosen.kept)
        found = torch.tensor([1.0 if place is None else weights[place] for place in kept], dtype=torch.float64)
        if len(found) and not found.any():
            raise DataError("Every row that is kept has a weight of 0; nothing would be trained. Leave weights out.")
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
        return self._selection(dataset, row_hashes(dataset), keep, count, threshold, source_column, unscored)

    def _selection(
        self,
        dataset: Dataset,
        hashes: list[str],
        keep: float,
        count: int | None,
        threshold: float | None,
        source_column: str | None,
        unscored: Unscored,
    ) -> Selection:
        check_amount(keep, count, threshold, unscored)
        places, visited = self._lookup(hashes), self._visited().tolist()
        unknown = [number for number, place in enumerate(places) if place is None]
        unvisited = [number for number, place in enumerate(places) if place is not None and not visited[place]]
        if unscored == "refuse" and (unknown or unvisited):
            raise DataError(unscored_rows(len(dataset), unknown, unvisited))
        left_out = {*unknown, *unvisited}
        scores, weights = self.scores.tolist(), self.weights().tolist()
        ranked = sorted(
            (-scores[place], hashes[number], number)
            for number, place in enumerate(places)
            if place is not None and number not in left_out
        )
        weight_of = {number: weights[place] for number, place in enumerate(places) if place is not None}
        chosen: list[tuple[float, str, int]] = []
        for group in by_source(dataset, source_column, ranked):
            if threshold is None:
                chosen += group[: amount_kept(keep, count, len(group))]
            else:
                chosen += [entry for entry in group if weight_of[entry[2]] >= threshold]
        last = max(chosen, default=None)
        return Selection(
            kept=sorted({number for _, _, number in chosen} | (left_out if unscored == "keep" else set())),
            threshold=None if last is None else weight_of[last[2]],
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
        about = {
            "schema": SCHEMA,
            "function": self.function,
            "normalized": self.normalized,
            "rows": len(self.logits),
            "dataset_fingerprint": self.fingerprint,
            "rows_file": ROWS,
            "settings": self.settings,
        }
        # What cannot be written is found out before anything is.
        text = json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # Copies, since safetensors refuses tensors that share memory.
        tensors = {
            name: values.detach().cpu().clone().contiguous()
            for name, values in {**self.statistics, "omega": self.logits}.items()
        }
        table = pa.table(
            {
                "row": list(range(len(self.logits))),
                "hash": self.row_hashes,
                "score": self.scores.tolist(),
                "weight": self.weights().tolist(),
                **{name: values.tolist() for name, values in self.statistics.items()},
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        # Without it the folder holds no selector: one that is interrupted here is not taken for an earlier one.
        (folder / SETTINGS).unlink(missing_ok=True)
        draft = folder / f".{TENSORS}.partial"
        draft.write_bytes(save(tensors))  # `save_file` leaves a file that only its owner can read
        draft.replace(folder / TENSORS)
        draft = folder / f".{ROWS}.partial"
        pq.write_table(table, draft)
        draft.replace(folder / ROWS)
        draft = folder / f".{SETTINGS}.partial"
        draft.write_text(text, encoding="utf-8")
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
            rows = pq.read_table(folder / ROWS, columns=["hash", "score"])
            found = cls(
                logits=tensors.pop("omega"),
                row_hashes=rows["hash"].to_pylist(),
                function=about["function"],
                normalized=about["normalized"],
                statistics=tensors,
                settings=about["settings"],
            )
            whole = found.fingerprint == about["dataset_fingerprint"]
            # The fingerprint is the same for rows in another order, as another run may have had them.
            scores = torch.tensor(rows["score"].to_pylist(), dtype=torch.float64)
            whole = whole and torch.allclose(found.scores, scores, rtol=1e-9, atol=0)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, OSError, SafetensorError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"The selector in {folder} cannot be read: {reason or type(error).__name__}. Copy the folder again."
            ) from error
        if not whole:
            raise DataError(
                f"The selector in {folder} is not whole: {TENSORS}, {ROWS} and {SETTINGS} do not belong to the same "
                "rows in the same order. Copy the folder again."
            )
        return found
