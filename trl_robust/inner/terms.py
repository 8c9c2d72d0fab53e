"""What an attack minimises: terms of batches of a model's completions, each with a loss for every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..objectives import LabelLogits, PreferenceLoss, away, toward
from ..threat.positions import SPANS, Positions, selected_ranks

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
    _check_keys(batch)
    if objective == "untargeted":
        if away_coef:
            raise ValueError("`away_coef` belongs to the targeted attack; set it to 0 with objective='untargeted'.")
        return [_mean_term(batch, -toward_coef, toward)]
    if objective == "swapped":
        return [preference_term(batch, preference or PreferenceLoss(), "The objective is 'swapped'")]
    terms = []
    if toward_coef:
        terms.append(_mean_term(batch, toward_coef, toward))
    if away_coef:
        terms.append(_mean_term(_away_batch(batch, f"`away_coef` is {away_coef}"), away_coef, away))
    if not terms:
        raise ValueError("`toward_coef` and `away_coef` are both 0: the attack has nothing to minimise.")
    return terms


def selected_by(terms: Sequence[Term], positions: Positions) -> torch.Tensor:
    """
    Ranks that may be perturbed in any term.

    Args:
        terms (sequence of [`Term`]):
            Terms over the same rows.
        positions (`str`):
            Which tokens, as [`~trl_robust.threat.selected_tokens`] names them.

    Returns:
        `torch.Tensor` of shape `(B, P)`, bool, as wide as the widest.
    """
    masks = [mask for term in terms for mask in selected_ranks(term.batch, positions).chunk(term.copies)]
    width = max(mask.shape[1] for mask in masks)
    return torch.stack([F.pad(mask, (0, width - mask.shape[1])) for mask in masks]).any(0)


def _check_keys(batch: Mapping[str, torch.Tensor]) -> None:
    if missing := [key for key in KEYS if key not in batch]:
        raise ValueError(f"The batch lacks {missing}.")


def _mean_term(
    batch: Mapping[str, torch.Tensor], weight: float, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Term:
    return Term(batch, lambda found: weight * found.row_means(loss(found.logits, found.targets)))


def _away_batch(batch: Mapping[str, torch.Tensor], reason: str) -> dict[str, torch.Tensor]:
    """The completions to go away from, as a batch of their own."""
    keys = (*KEYS, *SPANS.values())
    pushed = {key: batch[f"away_{key}"] for key in keys if f"away_{key}" in batch}
    if missing := [f"away_{key}" for key in KEYS if key not in pushed]:
        raise ValueError(f"{reason}, but the batch lacks {missing}.")
    for key in SPANS.values():
        if key in batch:
            pushed.setdefault(key, batch[key])
    return pushed


def completion_term(batch: Mapping[str, torch.Tensor]) -> Term:
    """
    The mean negative log-likelihood of every row's labelled tokens.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `labels`.

    Returns:
        [`Term`].

    Raises:
        `ValueError`: a missing key.
    """
    _check_keys(batch)
    return _mean_term(batch, 1.0, toward)


def preference_term(batch: Mapping[str, torch.Tensor], preference: PreferenceLoss, reason: str) -> Term:
    """
    The loss of preferring the completions of a batch to its `away_` completions.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            With `away_` keys, and `ref_log_probs` and `away_ref_log_probs` of shape `(B,)`.
        preference ([`~trl_robust.objectives.PreferenceLoss`]):
            The loss.
        reason (`str`):
            Why it is asked for, as messages begin.

    Returns:
        [`Term`] of two copies: the completions of all rows, then the others.

    Raises:
        `ValueError`: a missing key.
    """
    _check_keys(batch)
    pushed = _away_batch(batch, reason)
    references = [batch.get(key) for key in ("ref_log_probs", "away_ref_log_probs")]
    if any(reference is None for reference in references):
        raise ValueError(
            f"{reason}, but the batch lacks `ref_log_probs` or `away_ref_log_probs`: the summed log-probabilities of "
            "both completions under the reference."
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
    return stacked | {key: torch.cat([first[key], second[key]]) for key in SPANS.values() if key in first}
