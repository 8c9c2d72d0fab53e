"""Latent adversarial training on supervised fine-tuning.

What is different from TRL's SFTTrainer, in the order of a step:
- the batch carries the rejected completions and benign rows beside the wanted completions (`_prepare_dataset`);
- before the forward pass, the worst perturbation of the batch is searched for (`training_step`);
- the forward and backward pass run under it, with the away, benign and KL terms added (`compute_loss`);
- several updates may be made against one perturbation (`updates_per_attack`, in `Adversary`).
Without an attack and without extra terms, training is that of SFTTrainer bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer

from ..data import DataError, LATDataCollator, as_prompt_completion
from ..data.row_weights import WEIGHT
from ..objectives import LabelLogits, away, floored, label_logits, toward
from ..threat.positions import SPANS
from .attacked import AttackedTrainer
from .benign_terms import benign_terms, check_benign
from .frozen_base import FrozenBase
from .lat_rows import LATRows
from .lat_sft_config import LATSFTConfig
from .refusals import check_model
from .weighted_rows import WeightedRows


class LATSFTTrainer(LATRows, AttackedTrainer, WeightedRows, SFTTrainer):
    """
    Trainer for latent adversarial training (LAT) on supervised fine-tuning.

    An inner loop searches bounded perturbations of the hidden states that bring out unwanted behaviour; the outer
    step trains the model to behave well under them ([2407.15549](https://huggingface.co/papers/2407.15549), targeted;
    [2403.05030](https://huggingface.co/papers/2403.05030), untargeted):

    `toward_coef * CE(chosen | delta) + away_coef * W(rejected | delta) + sft_coef * CE(benign) + kl_coef * KL(benign)`

    Unlearning is the same with other rows: gradient ascent on pairs of a text to forget and one to retain, and generic
    labels for the tokens of a text (lat.md 4.2).

    Differs from the reference code: every micro-batch of an accumulated step is attacked, coefficients are not
    normalised, and the KL term is a plain mean over tokens. `faithful=True` trains as it does.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`].
        args ([`LATSFTConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `input_ids` and `labels`; it is used for every share of the batch.
        train_dataset ([`~datasets.Dataset`]):
            Preference data (`prompt`, `chosen`, `rejected`) for a targeted attack or an away term, prompt-completion
            data otherwise; plain or conversational. Or rows of `forget` and `retain` (texts; see
            [`~trl_robust.data.pair_corpora`]), or of `tokens` and `labels` (a generic label for every token).
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        benign_dataset ([`~datasets.Dataset`], *optional*):
            Prompt-completion data on which the model is to stay as useful as it is; never attacked.
        **kwargs:
            Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.

    Example:

    ```python
    from datasets import load_dataset
    from trl_robust import LATSFTConfig, LATSFTTrainer

    trainer = LATSFTTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=LATSFTConfig(attack_radius=0.1, attack_radius_unit="relative", away_coef=0.5),
        train_dataset=load_dataset("LLM-LAT/harmful-dataset", split="train"),
        benign_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    args: LATSFTConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    train_dataset: Any

    _tag_names = ["trl", "trl-robust", "lat", "sft"]
    _name = "LAT-SFT"
    _paper = {
        "title": "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
        "id": "2407.15549",
    }

    def __init__(
        self,
        model: Any,
        args: LATSFTConfig | None = None,
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
            args = LATSFTConfig(f"{name.split('/')[-1]}-LAT-SFT")
        if not isinstance(args, LATSFTConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LATSFTTrainer takes a LATSFTConfig.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` would replace the loss under attack. Subclass LATSFTTrainer instead."
            )
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        check_benign(args, benign_dataset)
        # `SFTTrainer.__init__` calls `_prepare_dataset`, so what that needs stands here.
        train_dataset = as_prompt_completion(
            train_dataset, "training", needs_rejected=args.needs_rejected, needs_prompt=args.needs_prompt
        )
        ablates = args.attacks and args.attack_objective == "refusal_direction"
        uses_benign = benign_dataset is not None and (args.sft_coef or args.kl_coef or ablates)
        if not (args.toward_coef or args.away_coef or uses_benign):
            raise ValueError(
                "`toward_coef` and `away_coef` are 0 and no `benign_dataset` is given; there is nothing to train. "
                "Give one, or set one of the two above 0."
            )
        if uses_benign and "input_ids" in train_dataset.column_names:
            raise DataError(
                "The training dataset is tokenised, and benign rows are joined to text only. Pass the text, or leave "
                "`benign_dataset` out."
            )
        self._training_rows = train_dataset
        self._benign_dataset = (
            as_prompt_completion(benign_dataset, "benign", needs_prompt=ablates) if uses_benign else None
        )

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
        self._add_adversary()
        if args.kl_coef:
            self.base = FrozenBase(self.model)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._before_attack()
        step, micro_batches = self.state.global_step, self.current_gradient_accumulation_steps
        with self.adversary.attacking(self._attack_batch(inputs), step, micro_batches):
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
        inputs = self._prepare_inputs(inputs)
        with self.adversary.evaluating(self._attack_batch(inputs)):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        args = self.args
        inputs = dict(inputs)  # TRL writes into it
        for key in SPANS.values():
            inputs.pop(key, None)
        benign = inputs.pop("benign", None)
        rejected = {key: inputs.pop(f"away_{key}", None) for key in ("input_ids", "attention_mask", "labels")}
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        divided = num_items_in_batch is None  # by the accumulation steps, in the Trainer
        weights, rows = args.weights(benign is not None), inputs["input_ids"].shape[0]
        terms = []
        if args.toward_coef and args.toward_cutoff:
            found = label_logits(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
            means = floored(found.row_means(toward(found.logits, found.targets)), args.toward_cutoff)
            total = (_weighted(means, inputs) * found.row_counts).sum()
            terms.append(weights["toward"] * self._token_mean("toward", "toward", found, total, divided=divided))
        elif args.toward_coef:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            count = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
            shares = 1.0 if num_items_in_batch is None else num_items_in_batch / count / self._loss_scale
            self._record("toward_loss", loss.detach() * shares)
            terms.append(weights["toward"] * loss)
        if args.away_coef:
            found = label_logits(model, **rejected)
            terms.append(
                weights["away"]
                * self._token_mean("away", "away", found, self._away_sum(found, inputs), divided=divided)
            )
        # Forward, backward to the activations, backward to the weights.
        self.adversary.passes += 3 * rows * len(terms)
        if benign is not None:
            terms += benign_terms(self, model, benign, weights, divided=divided)
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]

    def _away_sum(self, found: LabelLogits, inputs: dict[str, Any]) -> torch.Tensor:
        """The away loss of a batch, summed over its tokens."""
        if self.args.away_loss == "unlikelihood":
            tokens = away(found.logits, found.targets)
            return _weighted(found.row_sums(tokens), inputs).sum() if WEIGHT in inputs else tokens.sum()
        means = floored(-found.row_means(toward(found.logits, found.targets)), -self.args.away_cutoff)
        return (_weighted(means, inputs) * found.row_counts).sum()

    def _labels_by_term(self, batches: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
        return super()._labels_by_term(batches) | {"toward": [batch["labels"] for batch in batches]}


def _weighted(values: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """One value a row, times the row's weight where rows have one."""
    return values * inputs[WEIGHT].to(values) if WEIGHT in inputs else values
