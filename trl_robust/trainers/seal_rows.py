"""The two datasets of the bilevel problem, prepared by TRL, and the loss of every row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data import DataError, as_prompt_completion, kept_whole
from ..data.row_weights import WEIGHT
from ..inner import attack_mode
from .adapters import TwoAdapters

ROW = "row_number"


@dataclass
class SEALCollator:
    """
    Collates rows that know their number; of pairs, the rejected completions are the second half of the batch.

    Args:
        collator (`Callable`):
            TRL's collator for rows of `input_ids` and `labels`.

    Returns:
        On a call, a batch of `input_ids`, `attention_mask` and `labels`; `row_number` of shape `(B,)` if rows have it.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        parts = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        if "away_input_ids" in rows[0]:
            parts += [{"input_ids": row["away_input_ids"], "labels": row["away_labels"]} for row in rows]
        batch = self.collator(parts)
        for column, dtype in ((ROW, torch.int64), (WEIGHT, torch.float32)):
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows], dtype=dtype)
        return batch


class SEALRows:
    """
    Mixin before TRL's SFTTrainer. `_training_rows` and `_safe_dataset` must be set before that trainer's constructor.
    """

    args: Any
    accelerator: Any
    data_collator: Any
    model: Any
    train_dataset: Any
    completion_only_loss: bool
    keeper: Any
    _signature_columns: Any
    _training_rows: Dataset
    _safe_dataset: Dataset | None
    _safe_rows: Dataset | None = None
    _references: torch.Tensor | None
    adapters: TwoAdapters | None
    compute_loss_context_manager: Any
    _prepare_inputs: Any

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        prepare_rows = super()._prepare_dataset  # type: ignore[misc]

        def prepared(rows: Dataset, name: str) -> Dataset:
            def by_trl(numbered: Dataset) -> Dataset:
                return prepare_rows(numbered, processing_class, args, packing, formatting_func, dataset_name)

            if "rejected" not in rows.column_names:
                return kept_whole(by_trl, rows, name, args.max_length)
            wanted = kept_whole(by_trl, rows.remove_columns("rejected"), f"{name} (chosen)", args.max_length)
            other = rows.remove_columns("completion").rename_column("rejected", "completion")
            # TRL shuffles both with the same seed, and none lost a row: row i of both is the same.
            other = kept_whole(by_trl, other, f"{name} (rejected)", args.max_length)
            for column in ("input_ids", "labels"):
                wanted = wanted.add_column(f"away_{column}", other[column][:])
            return wanted

        if dataset is not self._training_rows:  # the evaluation datasets, at construction or given to `evaluate`
            rows = as_prompt_completion(dataset, "evaluation" if dataset_name == "eval" else dataset_name)
            return prepared(rows.remove_columns([name for name in ("rejected",) if name in rows.column_names]), "eval")
        rows = prepared(dataset.add_column(ROW, list(range(len(dataset)))), "training")
        if self._safe_dataset is not None:
            # TRL decided from the training rows whether prompts are trained on; those of the safe set may differ.
            decided = self.completion_only_loss
            if args.completion_only_loss is None:
                self.completion_only_loss = "prompt" in self._safe_dataset.column_names
            self._safe_rows = prepared(self._safe_dataset, "safe")
            self.completion_only_loss = decided
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        ours = (ROW, "away_input_ids", "away_labels")
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Of evaluation, and of plain SFT: a model need not take arguments that it does not know.
        known = {key: value for key, value in inputs.items() if key != ROW}
        return super().compute_loss(model, known, *args, **kwargs)  # type: ignore[misc]

    # The losses of rows

    def _log_probs(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the log-probabilities of every completion of a batch, and its length in tokens."""
        with self.compute_loss_context_manager():
            found = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=batch["labels"],
                fused_lm_head=True,
                use_cache=False,
            )
        return found.log_probs.sum(1), found.label_mask.sum(1).clamp(min=1)

    def _row_losses(self, batch: dict[str, Any], references: torch.Tensor | None) -> torch.Tensor:
        """
        Loss of every row under the active adapter: the mean over its completion's tokens, or the loss of a pair.

        Args:
            batch (`dict`):
                As [`SEALCollator`] makes it.
            references (`torch.Tensor` of shape `(B, 2)`, *optional*):
                For pairs: log-probabilities of chosen and rejected under the reference.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        sums, counts = self._log_probs(batch)
        if references is None:
            return -sums / counts
        chosen, rejected = (sums - references.T.flatten().to(sums)).chunk(2)
        return self.args.preference(chosen, rejected, *counts.chunk(2))

    def _reference_log_probs(self, rows: Dataset | None, what: str) -> torch.Tensor | None:
        """Log-probabilities of both completions of all pairs under the model as it is now, `(n, 2)`; else nothing."""
        if rows is None or "away_input_ids" not in rows.column_names:
            return None
        found = torch.zeros(len(rows), 2, dtype=torch.float64)
        with attack_mode(self.model), torch.no_grad():
            for numbers, batch in self._batches(rows, f"Reference log-probabilities of the {what} pairs"):
                found[numbers] = self._log_probs(batch)[0].double().cpu().view(2, -1).T
        return self._summed(found)

    def _losses_of_all_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses of all training rows by their number, `(N,)`, under the model and, if there is one, the auxiliary."""
        losses, auxiliary = torch.zeros(2, len(self.train_dataset), dtype=torch.float64)
        with torch.no_grad():
            self.model.eval()
            for places, batch in self._batches(self.train_dataset, "Losses of all rows"):
                rows = torch.tensor(self.train_dataset[places][ROW])
                references = None if self._references is None else self._references[rows]
                losses[rows] = self._row_losses(batch, references).double().cpu()
                if self.adapters is not None:
                    with self.adapters.auxiliary_active():
                        auxiliary[rows] = self._row_losses(batch, references).double().cpu()
        return self._summed(losses), None if self.adapters is None else self._summed(auxiliary)

    def _batches(self, rows: Dataset, description: str) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This process's share of some rows, in batches, with a progress bar; each with the places of its rows."""
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        own = range(self.accelerator.process_index, len(rows), processes)
        starts = tqdm(
            range(0, len(own), size),
            desc=description,
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )
        for start in starts:
            numbers = list(own[start : start + size])
            batch = self._prepare_inputs(self.data_collator([rows[number] for number in numbers]))
            self.keeper.passes += len(batch["input_ids"])
            yield numbers, batch

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Values to which every process has its own share, the rest being 0."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.float().to(self.accelerator.device), "sum").double().cpu()


def seal_rows(dataset: Dataset, name: str) -> Dataset:
    """
    Checks a dataset of the bilevel problem.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompt-completion, preference or language-modelling data.
        name (`str`):
            What messages call it.

    Returns:
        [`~datasets.Dataset`]: of pairs, the chosen completion is `completion`, and `rejected` stands beside it.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used.
    """
    rows = as_prompt_completion(dataset, name)
    if "input_ids" in rows.column_names:
        raise DataError(
            f"The {name} dataset is tokenised, and a selector knows rows by their text. Pass the text (`prompt` and "
            "`completion`)."
        )
    if "tokens" in rows.column_names:
        raise DataError(f"The {name} dataset holds generic labels; `prompt` and `completion` are needed.")
    return rows
