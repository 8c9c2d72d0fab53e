"""What an attack minimises: terms of batches of a model's completions, each with a loss for every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..objectives import LabelLogits, PreferenceLoss, away, toward

KEYS = ("input_ids", "attention_mask", "labels")
FILLERS = {"input_ids": 0, "attention_mask": 0, "labels": -100}


@dataclass
class Term:
    """
    One term of an attack's loss.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `labels` of one forward pass.
        row_losses (`Callable`):
            From the logits at its labels to a loss for every row of the perturbation, a tensor of shape `(B,)`.
        copies (`int`, *optional*, defaults to `1`):
            How often the rows of the perturbation stand in the batch.
    """

    batch: Mapping[str, torch.Tensor]
    row_losses: Callable[[LabelLogits], torch.Tensor]
    copies: int = 1


def attack_terms(
    batch: Mapping[str, torch.Tensor],
    objective: str,
    toward_coef: float,
    away_coef: float,
    preference: PreferenceLoss | None = None,
) -> list[Term]:
    """
    The terms of an objective. The attack minimises their sum.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            As [`~trl_robust.find_perturbation`] takes it.
        objective (`str`):
            As there.
        toward_coef (`float`):
            Weight of the toward term.
        away_coef (`float`):
            Weight of the away term.
        preference ([`~trl_robust.objectives.PreferenceLoss`], *optional*):
            Of `"swapped"`.

    Returns:
        `list` of [`Term`].

    Raises:
        `ValueError`: a key that the objective needs is missing, or there is nothing to minimise.
    """
    if missing := [key for key in KEYS if key not in batch]:
        raise ValueError(f"The batch lacks {missing}.")
    if objective == "untargeted":
        if away_coef:
            raise ValueError("`away_coef` belongs to the targeted attack; set it to 0 with objective='untargeted'.")
        return [_mean_term(batch, -toward_coef, toward)]
    if objective == "swapped":
        return [_preference_term(batch, preference or PreferenceLoss())]
    terms = []
    if toward_coef:
        terms.append(_mean_term(batch, toward_coef, toward))
    if away_coef:
        terms.append(_mean_term(_away_batch(batch, f"`away_coef` is {away_coef}"), away_coef, away))
    if not terms:
        raise ValueError("`toward_coef` and `away_coef` are both 0: the attack has nothing to minimise.")
    return terms


def _mean_term(
    batch: Mapping[str, torch.Tensor], weight: float, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Term:
    return Term(batch, lambda found: weight * found.row_means(loss(found.logits, found.targets)))


def _away_batch(batch: Mapping[str, torch.Tensor], reason: str) -> dict[str, torch.Tensor]:
    """The completions to go away from, as a batch of their own."""
    keys = (*KEYS, "last_user_span")
    pushed = {key: batch[f"away_{key}"] for key in keys if f"away_{key}" in batch}
    if missing := [f"away_{key}" for key in KEYS if key not in pushed]:
        raise ValueError(f"{reason}, but the batch lacks {missing}.")
    if "last_user_span" in batch:
        pushed.setdefault("last_user_span", batch["last_user_span"])
    return pushed


def _preference_term(batch: Mapping[str, torch.Tensor], preference: PreferenceLoss) -> Term:
    """The preference loss with the pair swapped: the completions to bring out are the preferred ones."""
    pushed = _away_batch(batch, "The objective is 'swapped'")
    references = [batch.get(key) for key in ("ref_log_probs", "away_ref_log_probs")]
    if any(reference is None for reference in references):
        raise ValueError(
            "The objective is 'swapped', but the batch lacks `ref_log_probs` or `away_ref_log_probs`: the summed "
            "log-probabilities of both completions under the reference."
        )
    both = _stacked(batch, pushed)
    reference = torch.cat([reference for reference in references if reference is not None])

    def row_losses(found: LabelLogits) -> torch.Tensor:
        log_probs = found.row_sums(-toward(found.logits, found.targets))
        preferred, other = (log_probs - reference.to(log_probs)).chunk(2)
        return preference(preferred, other, *found.row_counts.chunk(2))

    return Term(both, row_losses, copies=2)


def _stacked(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of two batches below one another, the shorter padded on the right."""
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    stacked = {
        key: torch.cat(
            [F.pad(part[key], (0, width - part[key].shape[1]), value=FILLERS[key]) for part in (first, second)]
        )
        for key in KEYS
    }
    if "last_user_span" in first:
        stacked["last_user_span"] = torch.cat([first["last_user_span"], second["last_user_span"]])
    return stacked
