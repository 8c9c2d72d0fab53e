"""Latent adversarial training on representation misdirection for unlearning (RMU).

What is different from TRL's SFTTrainer, in the order of a step:
- a row is a text to forget and a text to retain (`LATRows`);
- the adversary looks for the perturbation that brings the forgotten text back (`training_step`);
- under it, the hidden states of the text to forget are steered to one fixed random vector a topic, and without it
  those of the text to retain are kept where the starting model had them (`compute_loss`). There is no other loss.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer

from ..data import LATDataCollator, as_prompt_completion
from ..data.row_weights import refuse_row_weights
from ..inner import hidden_after
from ..objectives import steering_error
from ..threat.sites import base_model, decoder_layers, resolve_sites
from .attacked import AttackedTrainer
from .frozen_base import FrozenBase
from .lat_rmu_config import LATRMUConfig
from .lat_rows import LATRows
from .refusals import check_model


class LATRMUTrainer(LATRows, AttackedTrainer, SFTTrainer):
    """
    Trainer for unlearning by representation misdirection (RMU) under latent attack.

    `MSE(h(forget | delta), c * u) + rmu_retain_coef * MSE(h(retain), h_start(retain))`, `h` the hidden states after
    `rmu_layer`, `u` a random unit vector, one for every topic and the same through the whole run
    ([2403.03218](https://huggingface.co/papers/2403.03218); under attack
    [2407.15549](https://huggingface.co/papers/2407.15549)). The adversary brings the forgotten text back: toward it
    and away from the retain text.

    Differs from the reference code, which draws a new vector for every batch (D12) and counts padding (D13): padding
    takes no part in either term, and each term is a mean over its tokens in the whole accumulated batch.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.SFTTrainer`].
        args ([`LATRMUConfig`], *optional*):
            Settings.
        data_collator (`Callable`, *optional*):
            Collates rows of `input_ids` and `labels`; it is used for both texts.
        train_dataset ([`~datasets.Dataset`]):
            Rows of `forget` and `retain` (texts), and `topic` (text) if there are several; see
            [`~trl_robust.data.pair_corpora`].
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        **kwargs:
            Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        [`~trl_robust.data.DataError`]: data that cannot be used, naming the rows.
        `ValueError`: settings that cannot be honoured.

    Example:

    ```python
    from datasets import load_dataset
    from trl_robust import LATRMUConfig, LATRMUTrainer
    from trl_robust.data import pair_corpora

    trainer = LATRMUTrainer(
        model="HuggingFaceH4/zephyr-7b-beta",
        args=LATRMUConfig(max_length=768),
        train_dataset=pair_corpora(
            load_dataset("cais/wmdp-corpora", "cyber-forget-corpus", split="train"),
            load_dataset("wikitext", "wikitext-2-raw-v1", split="test"),
        ),
    )
    trainer.train()
    ```
    """

    args: LATRMUConfig
    model: Any  # the base classes allow None and streams here, before and where we do not
    train_dataset: Any

    _tag_names = ["trl", "trl-robust", "lat", "rmu", "unlearning"]
    _name = "LAT-RMU"
    _paper = {
        "title": "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
        "id": "2407.15549",
    }

    def __init__(
        self,
        model: Any,
        args: LATRMUConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LATRMUConfig(f"{name.split('/')[-1]}-LAT-RMU")
        if not isinstance(args, LATRMUConfig):
            raise TypeError(f"`args` is a {type(args).__name__}; LATRMUTrainer takes a LATRMUConfig.")
        if not isinstance(model, str):
            check_model(model, args)
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        # `SFTTrainer.__init__` calls `_prepare_dataset`, so what that needs stands here.
        refuse_row_weights(train_dataset, "training")
        train_dataset = as_prompt_completion(
            train_dataset, "training", needs_rejected=True, needs_prompt=args.needs_prompt
        )
        if "topic" not in train_dataset.column_names:
            train_dataset = train_dataset.add_column("topic", [""] * len(train_dataset))
        self._training_rows, self._benign_dataset = train_dataset, None

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
        depth = len(decoder_layers(self.model))
        (layer,) = resolve_sites([args.rmu_layer], depth)
        self.layer = int(layer)
        below = [str(number) for number in range(max(0, self.layer - 2), self.layer + 1)]
        layers, modules = args.trained_layers or below, args.trained_modules
        if hasattr(self.model, "peft_config"):  # the published modules are a default for whole weights
            layers, modules = args.trained_layers, []
            freeze_above(self.model, self.layer)
        elif any(int(above) > self.layer for above in resolve_sites(layers, depth)):
            raise ValueError(
                f"`trained_layers` {args.trained_layers} go above `rmu_layer` {args.rmu_layer} (layer {self.layer}), "
                "where the loss has no gradient. Name layers up to it."
            )
        self._add_adversary(layers=layers, modules=modules)
        self.base = FrozenBase(self.model)
        self._vectors: dict[str, torch.Tensor] = {}

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
        inputs = self._prepare_inputs(inputs)
        attacked = self.args.eval_under_attack and self.args.attacks
        with torch.no_grad(), self.compute_loss_context_manager():
            if not attacked:
                return self.compute_loss(model, inputs).detach(), None, None
            with self.adversary.evaluating(self._attack_batch(inputs)):
                return self.compute_loss(model, inputs).detach(), None, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise ValueError("RMU has no logits to return; leave out `compute_metrics`.")
        own = self.accelerator.unwrap_model(self.model)
        forget = {key: inputs[f"away_{key}"] for key in ("input_ids", "attention_mask")}
        retain = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        divided = num_items_in_batch is None
        weights = self.args.weights()

        states = hidden_after(own, forget, self.layer, model)
        real = forget["attention_mask"].bool()
        targets = self._targets(inputs.get("topic"), states).unsqueeze(1).expand(-1, states.shape[1], -1)
        loss = weights["steering"] * self._mean(
            "steering", "away", steering_error(states[real], targets[real]), divided=divided
        )
        share = (self.layer + 1) / len(decoder_layers(own))
        passes = 3 * share * states.shape[0]
        if weights["retain"]:
            with self.adversary.off():
                with self.base.restored(), self.accelerator.autocast():  # type: ignore[union-attr]
                    before = hidden_after(own, retain, self.layer)
                states = hidden_after(own, retain, self.layer, model)
            real = retain["attention_mask"].bool()
            loss = loss + weights["retain"] * self._mean(
                "retain", "retain", steering_error(states[real], before[real]), divided=divided
            )
            passes += 4 * share * states.shape[0]
        if self.model.training:
            self.adversary.passes += passes
        return loss

    def _mean(self, name: str, counted: str, errors: torch.Tensor, *, divided: bool) -> torch.Tensor:
        """A micro-batch's share of a term's mean over the tokens of the accumulated batch."""
        self._record(f"{name}_loss", errors.detach().mean())
        if not self.model.training or counted not in self._term_tokens:
            return errors.mean()
        scale = self._loss_scale * (self.current_gradient_accumulation_steps if divided else 1)
        return errors.sum() / self._term_tokens[counted].clamp(min=1) * scale

    def _labels_by_term(self, batches: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
        # Every real token has a hidden state, so they are counted by the mask; the mixin leaves the first column out.
        def counted(key: str) -> list[torch.Tensor]:
            masks = [batch[key] for batch in batches]
            return [nn.functional.pad(mask.masked_fill(mask == 0, -100), (1, 0), value=-100) for mask in masks]

        return {"away": counted("away_attention_mask"), "retain": counted("attention_mask")}

    def _targets(self, topics: list[str] | None, states: torch.Tensor) -> torch.Tensor:
        """The vector that every row is steered to, of shape `(B, H)`: one for every topic, through the whole run."""
        topics = [""] * states.shape[0] if topics is None else topics
        for topic in set(topics) - self._vectors.keys():
            seed = zlib.crc32(repr((self.args.seed, "rmu", topic)).encode())
            draw = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(seed))
            self._vectors[topic] = self.args.rmu_steering_coef * draw / torch.linalg.vector_norm(draw)
        return torch.stack([self._vectors[topic] for topic in topics]).to(states.device)


def freeze_above(model: nn.Module, layer: int) -> None:
    """
    Freezes the adapters above a layer, which its hidden states do not depend on (DDP would wait for their gradients).

    Args:
        model (`nn.Module`):
            A `PeftModel`.
        layer (`int`):
            Index of the last layer that is trained.
    """
    kept = {id(parameter) for below in decoder_layers(model)[: layer + 1] for parameter in below.parameters()}
    embedding = base_model(model).get_input_embeddings()
    kept |= {id(parameter) for parameter in embedding.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
