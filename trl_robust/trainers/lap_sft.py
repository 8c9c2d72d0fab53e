"""Latent adversarial paraphrasing on supervised fine-tuning.

What is different from TRL's SFTTrainer, in the order of a step:
- the update's branch is drawn, and for a perturbed one the longest perturbation of the prompts that leaves the loss
  within epsilon is searched for (`training_step`);
- the forward and backward pass run under it; in the branch `both` the unperturbed loss is added (`compute_loss`).
Without perturbations, training is that of SFTTrainer bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer

from ..data import LATDataCollator, add_user_spans, as_prompt_completion, kept_whole
from ..threat.positions import SPANS
from .lap_sft_config import LAPSFTConfig
from .paraphrased import ParaphrasedTrainer
from .refusals import check_model
from .weighted_rows import WeightedRows


class LAPSFTTrainer(ParaphrasedTrainer, WeightedRows, SFTTrainer):
    """
    Trainer for latent adversarial paraphrasing (LAP) on supervised fine-tuning.

    An inner loop searches, for every row, the longest perturbation of the prompt's hidden states that leaves the loss
    of the completion within epsilon, a paraphrase in latent space; the outer step minimises the loss under it
    ([2503.01345](https://huggingface.co/papers/2503.01345), Algorithm 1):

    `min E[J(delta)], delta = argmax ||delta|| s.t. |J(delta) - J(0)| <= epsilon`

    No paraphrases are needed, and nothing is added at inference.

    Differs from the paper, which leaves half of its settings unsaid: see the preset `robust`, and `paper` and
    `paper_rms` for the two readings of its loop.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`].
        args ([`LAPSFTConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `input_ids` and `labels`.
        train_dataset ([`~datasets.Dataset`]):
            Prompt-completion data, plain or conversational, or preference data, of which the chosen completions are
            taken.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form; evaluation is never perturbed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        **kwargs:
            Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.
        `FloatingPointError`: `lap_max_nonfinite` searches in a row without a finite row.

    Example:

    ```python
    from datasets import load_dataset
    from trl_robust import LAPSFTConfig, LAPSFTTrainer

    trainer = LAPSFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LAPSFTConfig(lap_epsilon=0.05, lap_positions="last_user"),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    args: LAPSFTConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    _signature_columns: Any

    _tag_names = ["trl", "trl-robust", "lap", "sft"]
    _name = "LAP-SFT"
    _paper = {
        "title": "Same Question, Different Words: A Latent Adversarial Framework for Prompt Robustness",
        "id": "2503.01345",
    }

    def __init__(
        self,
        model: Any,
        args: LAPSFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LAPSFTConfig(f"{name.split('/')[-1]}-LAP-SFT")
        if not isinstance(args, LAPSFTConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LAPSFTTrainer takes a LAPSFTConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would replace the loss that is kept. Subclass the trainer instead.")
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        # Here, since `SFTTrainer.__init__` looks at the columns before it calls `_prepare_dataset`.
        train_dataset = _wanted(train_dataset, "training", needs_prompt=args.needs_prompt)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator = LATDataCollator(self.data_collator)
        self._add_paraphraser()

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        prepare = super()._prepare_dataset

        def prepared(rows: Dataset) -> Dataset:
            return prepare(rows, processing_class, args, packing, formatting_func, dataset_name)

        if "input_ids" in dataset.column_names:
            return prepared(dataset)
        training = dataset_name == "train"
        name = "training" if training else "evaluation" if dataset_name == "eval" else dataset_name
        rows = kept_whole(prepared, _wanted(dataset, name), name, args.max_length)
        if not (training and args.attacks):
            return rows
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        return add_user_spans(rows, processing_class, args.lap_positions, name, **template)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [column for column in SPANS.values() if column not in self._signature_columns]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.paraphraser.training(inputs, self.state.global_step) as self._update:
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

        def loss() -> torch.Tensor:
            self.paraphraser.passes += 3 * inputs["input_ids"].shape[0]
            return super(LAPSFTTrainer, self).compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

        count = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        share = 1.0 if num_items_in_batch is None else num_items_in_batch / count / self._loss_scale
        return self._loss_of_update(loss, share)


def _wanted(dataset: Dataset, name: str, *, needs_prompt: bool = False) -> Dataset:
    """Prompts and the completions that are wanted; of pairs, the rejected ones are left out."""
    rows = as_prompt_completion(dataset, name, needs_prompt=needs_prompt)
    return rows.remove_columns("rejected") if "rejected" in rows.column_names else rows
