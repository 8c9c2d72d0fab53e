"""Latent adversarial training on direct preference optimisation.

What is different from TRL's DPOTrainer, in the order of a step:
- the reference's log-probabilities of a batch are computed once, never under a perturbation (`reference_log_probs`);
- one perturbation a pair is searched for: it serves both completions (`training_step`);
- the forward and backward pass run under it; benign terms are added (`compute_loss`).
Without an attack and without benign rows, training is that of DPOTrainer bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import DPOTrainer

from ..data import PreferenceCollator, add_user_spans, as_prompt_completion, join_benign, kept_whole
from ..threat.positions import SPANS
from .attacked import AttackedTrainer
from .benign_terms import benign_terms, check_benign
from .frozen_base import FrozenBase
from .lat_dpo_config import LATDPOConfig
from .pairs import REFERENCES, PairedTrainer, as_pairs, halves
from .refusals import check_model


class LATDPOTrainer(PairedTrainer, AttackedTrainer, DPOTrainer):
    """
    Trainer for latent adversarial training (LAT) on direct preference optimisation.

    An inner loop searches one bounded perturbation of the prompt's hidden states for every pair of completions; the
    outer step minimises the DPO loss under it ([2407.15549](https://huggingface.co/papers/2407.15549), backdoors):

    `DPO(chosen > rejected | delta) + sft_coef * CE(benign) + kl_coef * KL(benign)`

    The adversary minimises the DPO loss of the pair the other way round (`attack_objective="swapped"`), or goes toward
    the rejected and away from the chosen completion (`"targeted"`), as in LAT on SFT. The reference (adapters off, a
    frozen copy of adapters that are trained further, or another model) never sees a perturbation.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As for [`~trl.DPOTrainer`].
        args ([`LATDPOConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `prompt_ids`, `chosen_ids` and `rejected_ids`.
        train_dataset ([`~datasets.Dataset`]):
            Preference data (`prompt`, `chosen`, `rejected`), plain or conversational.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        benign_dataset ([`~datasets.Dataset`], *optional*):
            Prompt-completion data on which the model is to stay as useful as it is; never attacked.
        **kwargs:
            Everything else that [`~trl.DPOTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_robust import LATDPOConfig, LATDPOTrainer

    trainer = LATDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LATDPOConfig(attack_radius=0.1, attack_radius_unit="relative", beta=0.3),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    args: LATDPOConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    train_dataset: Any
    _signature_columns: Any

    _tag_names = ["trl", "trl-robust", "lat", "dpo"]
    _name = "LAT-DPO"
    _paper = {
        "title": "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
        "id": "2407.15549",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: LATDPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        *,
        benign_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LATDPOConfig(f"{name.split('/')[-1]}-LAT-DPO")
        if not isinstance(args, LATDPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LATDPOTrainer takes a LATDPOConfig.")
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        check_benign(args, benign_dataset)
        # `DPOTrainer.__init__` calls `_prepare_dataset`, so what that needs stands here.
        ablates = args.attacks and args.attack_objective == "refusal_direction"
        uses_benign = benign_dataset is not None and (args.sft_coef or args.kl_coef or ablates)
        self._training_rows = as_pairs(train_dataset, "training")
        self._benign_dataset = (
            as_prompt_completion(benign_dataset, "benign", needs_prompt=True) if uses_benign else None
        )

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._training_rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator = PreferenceCollator(self.data_collator, self._tokenizer.pad_token_id)
        self._add_adversary(args.preference if args.attack_objective == "swapped" else None)
        if args.kl_coef:
            self.base = FrozenBase(self.model)

    # Data

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        if "prompt_ids" in dataset.column_names:  # prepared already
            return dataset
        prepare_rows = super()._prepare_dataset

        def prepare(rows: Dataset, name: str) -> Dataset:
            def by_trl(numbered: Dataset) -> Dataset:
                return prepare_rows(numbered, processing_class, args, name)

            return kept_whole(by_trl, rows, name, args.max_length)

        is_training = dataset is self._training_rows
        if not is_training:
            dataset = as_pairs(dataset, "evaluation" if dataset_name == "eval" else dataset_name)
        prepared = prepare(dataset, dataset_name)
        prepared = add_user_spans(prepared, processing_class, args.attack_positions, dataset_name)
        if is_training and self._benign_dataset is not None:
            # TRL's preparation knows pairs: the completion stands in both places, and one is not used.
            pairs = self._benign_dataset.rename_column("completion", "chosen")
            benign = prepare(pairs.add_column("rejected", pairs["chosen"][:]), "benign")
            prepared = join_benign(prepared, _as_labelled(benign, args.max_length), args.benign_per_example, args.seed)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = ["benign_input_ids", "benign_labels", *SPANS.values()]
        self._signature_columns += [column for column in ours if column not in self._signature_columns]

    def _attack_batch(self, inputs: dict[str, Any], *, wanted: bool = False) -> dict[str, Any]:
        """The chosen half and the rejected half of a batch, each with labels; see [`AttackedTrainer`]."""
        chosen, rejected = halves(inputs)
        kept = {key: inputs[key] for key in (*SPANS.values(), *(["benign"] if wanted else [])) if key in inputs}
        if wanted or self.args.attack_objective == "untargeted":
            return {**chosen, **kept}
        # The attack wants what the defence does not: the roles of the two completions change places.
        batch = {**rejected, **{f"away_{key}": value for key, value in chosen.items()}, **kept}
        if self.args.attack_objective == "swapped":
            batch |= {"ref_log_probs": inputs[REFERENCES[1]], "away_ref_log_probs": inputs[REFERENCES[0]]}
        return batch

    # The step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if not self.args.attacks:
            self._before_attack()
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._with_references(self._prepare_inputs(inputs))
        self._before_attack()
        step, micro_batches = self.state.global_step, self.current_gradient_accumulation_steps
        batch = self._attack_batch(inputs)
        with self._references_given(), self.adversary.attacking(batch, step, micro_batches, copies=2):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        if not (self.args.eval_under_attack and self.args.attacks):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._with_references(self._prepare_inputs(inputs))
        batch = self._attack_batch(inputs)
        with self._references_given(), self.adversary.evaluating(batch, copies=2):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        for key in SPANS.values():
            inputs.pop(key, None)
        benign = inputs.pop("benign", None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        self.adversary.passes += 3 * inputs["input_ids"].shape[0]
        if not self.precompute_ref_logps:
            self.adversary.passes += inputs["input_ids"].shape[0]  # TRL has asked the reference
        if benign is None:
            return loss
        weights = self.args.weights(True)
        # TRL's DPO loss is a mean over pairs that the Trainer divides by the accumulation steps.
        terms = benign_terms(self, model, benign, weights, divided=True)
        return torch.stack([weights["dpo"] * loss, *terms]).sum()


def _as_labelled(pairs: Dataset, max_length: int | None) -> Dataset:
    """Rows of `prompt_ids` and `chosen_ids` as `input_ids` and `labels`."""

    def join(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answer = row["prompt_ids"], row["chosen_ids"]
        return {
            "input_ids": (prompt + answer)[:max_length],
            "labels": ([-100] * len(prompt) + answer)[:max_length],
        }

    return pairs.map(join, remove_columns=pairs.column_names, desc="Labelling benign rows")
