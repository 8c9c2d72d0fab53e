"""The terms that keep a model useful, on benign rows that are never attacked."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..objectives import kl_divergence, label_logits, self_normalised, toward
from .attacked import AttackedTrainer


def check_benign(args: Any, benign_dataset: Dataset | None) -> None:
    """
    Refuses settings that need benign rows where there are none.

    Args:
        args ([`LATSFTConfig`] or [`LATDPOConfig`]):
            Settings.
        benign_dataset ([`~datasets.Dataset`], *optional*):
            Benign rows.

    Raises:
        `ValueError`: naming the setting.
    """
    if benign_dataset is not None:
        return
    if args.kl_coef:
        raise ValueError(
            "`kl_coef` is a weight on benign data, and no `benign_dataset` is given. Give one, or set it to 0."
        )
    if args.attacks and args.attack_objective == "refusal_direction":
        raise ValueError(
            "`attack_objective: refusal_direction` tells harmful prompts from harmless ones, and no `benign_dataset` "
            "is given. Give one, or use another objective."
        )


def benign_terms(
    trainer: AttackedTrainer, model: nn.Module, benign: dict[str, Any], weights: dict[str, float], *, divided: bool
) -> list[torch.Tensor]:
    """
    The weighted cross-entropy and KL terms of a micro-batch of benign rows.

    Args:
        trainer ([`AttackedTrainer`]):
            The trainer, with its `base` if there is a KL term.
        model (`nn.Module`):
            The model, in its distributed wrapper.
        benign (`dict`):
            A batch of benign rows.
        weights (`dict`):
            Weights with the keys `sft` and `kl`.
        divided (`bool`):
            Whether the Trainer will divide the loss by the accumulation steps.

    Returns:
        `list` of scalars.
    """
    if not (weights["sft"] or weights["kl"]):
        return []
    terms = []
    rows = benign["input_ids"].shape[0]
    batch = (benign["input_ids"], benign["attention_mask"], benign["labels"])
    with trainer.adversary.off():
        found = label_logits(model, *batch)
        trainer.adversary.passes += 3 * rows
        if weights["sft"]:
            total = toward(found.logits, found.targets).sum()
            terms.append(weights["sft"] * trainer._token_mean("sft", "benign", found, total, divided=divided))
        if weights["kl"]:
            assert trainer.base is not None
            with trainer.base.restored(), trainer.accelerator.autocast():
                reference = label_logits(trainer.model, *batch).logits
            trainer.adversary.passes += rows
            total = kl_divergence(found.logits, reference).sum()
            if trainer.args.kl_form == "log" or trainer.args.faithful:
                trainer._record("kl_divergence", total.detach() / max(len(found.targets), 1))
                mean = total / max(len(found.targets), 1)
                total = self_normalised(mean, found.logits.shape[-1]) * len(found.targets)
            terms.append(weights["kl"] * trainer._token_mean("kl", "benign", found, total, divided=divided))
    return terms
