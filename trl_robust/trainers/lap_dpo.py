"""Latent adversarial paraphrasing inside direct preference optimisation: ours, no paper has it.

What is different from TRL's DPOTrainer, in the order of a step:
- the update's branch is drawn, and for a perturbed one the longest perturbation of every pair's prompt that leaves its
  DPO loss within epsilon is searched for (`training_step`);
- the forward and backward pass run under it; in the branch `both` the unperturbed loss is added (`compute_loss`).
The reference is never perturbed. Without perturbations, training is that of DPOTrainer bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import DPOTrainer

from ..data import PreferenceCollator, add_user_spans, kept_whole
from ..threat.positions import SPANS
from .lap_dpo_config import LAPDPOConfig
from .pairs import REFERENCES, PairedTrainer, as_pairs, halves
from .paraphrased import ParaphrasedTrainer
from .refusals import check_model


class LAPDPOTrainer(PairedTrainer, ParaphrasedTrainer, DPOTrainer):
    """
    Trainer for latent adversarial paraphrasing (LAP) inside direct preference optimisation.

    **This joint form is ours.** The paper ([2503.01345](https://huggingface.co/papers/2503.01345)) trains with LAP on
    SFT, and then with ordinary DPO: for that, run [`LAPSFTTrainer`] and give its model to [`~trl.DPOTrainer`].

    One perturbation a pair is searched for: the longest one of the prompt's hidden states, shared by both completions,
    that leaves the pair's DPO loss within epsilon. The outer step minimises the DPO loss under it.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As for [`~trl.DPOTrainer`]; it never sees a perturbation.
        args ([`LAPDPOConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.
        train_dataset ([`~datasets.Dataset`]):
            Preference data (`prompt`, `chosen`, `rejected`), plain or conversational.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form; evaluation is never perturbed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        **kwargs:
            Everything else that [`~trl.DPOTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.
        `FloatingPointError`: `lap_max_nonfinite` searches in a row without a finite row.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_robust import LAPDPOConfig, LAPDPOTrainer

    trainer = LAPDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LAPDPOConfig(lap_epsilon=0.05, beta=0.1),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    args: LAPDPOConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    _signature_columns: Any

    _tag_names = ["trl", "trl-robust", "lap", "dpo"]
    _name = "LAP-DPO (the joint form, of trl-robust)"
    _paper = {
        "title": "Same Question, Different Words: A Latent Adversarial Framework for Prompt Robustness",
        "id": "2503.01345",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: LAPDPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LAPDPOConfig(f"{name.split('/')[-1]}-LAP-DPO")
        if not isinstance(args, LAPDPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LAPDPOTrainer takes a LAPDPOConfig.")
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator = PreferenceCollator(self.data_collator, self._tokenizer.pad_token_id)
        self._add_paraphraser(args.preference)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        if "prompt_ids" in dataset.column_names:  # prepared already
            return dataset
        prepare = super()._prepare_dataset
        name = {"train": "training", "eval": "evaluation"}.get(dataset_name, dataset_name)
        rows = kept_whole(
            lambda numbered: prepare(numbered, processing_class, args, dataset_name),
            as_pairs(dataset, name),
            name,
            args.max_length,
        )
        if dataset_name == "train" and args.attacks:
            return add_user_spans(rows, processing_class, args.lap_positions, name)
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in SPANS.values() if column not in self._signature_columns]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        step = self.state.global_step
        if self.paraphraser.branch_at(step) == "plain":
            with self.paraphraser.training({}, step) as self._update:
                return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._with_references(inputs)
        chosen, rejected = halves(inputs)
        batch = {
            **chosen,
            **{f"away_{key}": value for key, value in rejected.items()},
            "ref_log_probs": inputs[REFERENCES[0]],
            "away_ref_log_probs": inputs[REFERENCES[1]],
            **{key: inputs[key] for key in SPANS.values() if key in inputs},
        }
        with self._references_given(), self.paraphraser.training(batch, step, copies=2) as self._update:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = {key: value for key, value in inputs.items() if key not in SPANS.values()}
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.precompute_ref_logps:
            self.paraphraser.passes += inputs["input_ids"].shape[0]  # TRL asks the reference

        def loss() -> torch.Tensor:
            self.paraphraser.passes += 3 * inputs["input_ids"].shape[0]
            return super(LAPDPOTrainer, self).compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

        return self._loss_of_update(loss, 1.0)
