from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from ..data import (
    DataError,
    add_user_spans,
    as_prompt_completion,
    generic_label_rows,
    is_generic_labels,
    join_benign,
    kept_whole,
)
from ..threat.positions import SPANS


class LATRows:
    """
    Mixin before TRL's SFTTrainer: beside their own completions, rows hold those the adversary wants, and benign rows.

    `_training_rows` and `_benign_dataset` must be set before that trainer's constructor, which prepares the rows.
    """

    args: Any
    chat_template: Any
    completion_only_loss: bool
    _signature_columns: Any
    _training_rows: Dataset
    _benign_dataset: Dataset | None

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

        def prepare(rows: Dataset, name: str) -> Dataset:
            def by_trl(numbered: Dataset) -> Dataset:
                return prepare_rows(numbered, processing_class, args, packing, formatting_func, dataset_name)

            return kept_whole(by_trl, rows, name, args.max_length)

        is_training = dataset is self._training_rows
        if not is_training:  # the evaluation datasets, at construction or given to `evaluate`
            # Without rejected completions a targeted attack would draw the model to the wanted ones.
            attacked = args.eval_under_attack and args.attacks
            name = "evaluation" if dataset_name == "eval" else dataset_name
            dataset = as_prompt_completion(
                dataset,
                name,
                needs_rejected=attacked and args.needs_rejected,
                needs_prompt=attacked and args.needs_prompt,
            )
        if is_generic_labels(dataset):
            prepared = generic_label_rows(dataset, args.max_length)
        elif "input_ids" in dataset.column_names:
            return prepare_rows(dataset, processing_class, args, packing, formatting_func, dataset_name)
        else:
            unwanted = next((column for column in ("rejected", "forget") if column in dataset.column_names), None)
            wanted = dataset.remove_columns(unwanted) if unwanted else dataset
            prepared = prepare(wanted, f"{dataset_name} (wanted)" if unwanted else dataset_name)
            template = {"chat_template": self.chat_template} if self.chat_template else {}
            prepared = add_user_spans(prepared, processing_class, args.attack_positions, dataset_name, **template)
            if unwanted and args.needs_rejected:
                place = "completion" if unwanted == "rejected" else "text"
                other = dataset.remove_columns(place).rename_column(unwanted, place)
                # TRL shuffles both shares with the same seed, and none lost a row: row i of both is the same.
                other = prepare(other, f"{dataset_name} ({unwanted})")
                for column in ("input_ids", "labels"):
                    prepared = prepared.add_column(f"away_{column}", other[column][:])
        if is_training and self._benign_dataset is not None:
            # TRL decided from the training rows whether prompts are trained on; corpora have none, benign rows may.
            decided = self.completion_only_loss
            if args.completion_only_loss is None:
                self.completion_only_loss = "prompt" in self._benign_dataset.column_names
            benign = prepare(self._benign_dataset, "benign")
            self.completion_only_loss = decided
            prepared = join_benign(prepared, benign, args.benign_per_example, args.seed)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        ours = ["away_input_ids", "away_labels", "benign_input_ids", "benign_labels", "topic", *SPANS.values()]
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _labels_by_term(self, batches: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
        found = {"away": [batch["away_labels"] for batch in batches if "away_labels" in batch]}
        return found | super()._labels_by_term(batches)  # type: ignore[misc]

    def _attack_batch(self, inputs: dict[str, Any], *, wanted: bool = False) -> dict[str, Any]:
        batch = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        if wanted:
            return batch | {key: inputs[key] for key in ("benign",) if key in inputs}
        if self.args.attacks and self.args.attack_objective == "targeted" and "away_labels" not in batch:
            raise DataError("A targeted attack met a batch without rejected completions. Give preference data.")
        if self.args.attack_objective != "untargeted" and "away_labels" in batch:
            # The attack wants what the defence does not: the roles of the two completions change places.
            keys = ("input_ids", "attention_mask", "labels")
            swapped = {key: batch[f"away_{key}"] for key in keys} | {f"away_{key}": batch[key] for key in keys}
            return swapped | {key: batch[key] for key in SPANS.values() if key in batch}
        return batch
