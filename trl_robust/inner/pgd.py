"""Projected gradient descent on hidden states: the worst perturbation that a threat model allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from ..objectives import PreferenceLoss
from ..threat.model import ThreatModel
from ..threat.sites import Site
from .injection import Perturbation, attack_mode
from .norms import median_norms
from .search import NonBindingRadiusWarning, Search
from .terms import attack_terms

__all__ = ["Init", "NonBindingRadiusWarning", "Objective", "Optimizer", "find_perturbation"]

Objective = Literal["targeted", "untargeted", "random", "swapped"]
Optimizer = Literal["adamw", "steepest", "sign"]
Init = Literal["zero", "random", "warm"]


def find_perturbation(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    threat: ThreatModel,
    *,
    objective: Objective = "targeted",
    steps: int = 16,
    learning_rate: float = 5e-2,
    optimizer: Optimizer = "adamw",
    toward_coef: float = 1.0,
    away_coef: float = 0.0,
    init: Init = "zero",
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    preference: PreferenceLoss | None = None,
    start: Mapping[Site, torch.Tensor] | None = None,
    num_sites: int | None = None,
) -> Perturbation:
    """
    Searches the perturbation of a batch's hidden states that brings out the unwanted behaviour most.

    Rows do not influence one another: the loss is a sum over rows of means over a row's labelled tokens, so splitting
    a batch changes nothing but rounding. The search runs in evaluation mode on frozen parameters and leaves no
    gradient, no hook and no change of mode behind.

    Args:
        model (`nn.Module`):
            A transformers causal language model or a `PeftModel`, outside distributed wrappers.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask`, `labels` of the completions the attack draws the model toward, each of
            shape `(B, T)`. With an away term also `away_input_ids`, `away_attention_mask`, `away_labels`: the
            completions it pushes away from. Row `i` of both has the same prompt and shares one perturbation. For
            `"swapped"` also `ref_log_probs` and `away_ref_log_probs` of shape `(B,)`.
        threat ([`ThreatModel`]):
            Where and how far. A relative radius is measured on this batch.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"` minimises `toward_coef * CE(labels) + away_coef * W(away_labels)` (2407.15549, Eq. 3),
            `"untargeted"` maximises the cross-entropy of `labels`, the wanted completions (2403.05030), `"random"`
            draws a random point of the boundary: the control, and `"swapped"` minimises the preference loss of
            `labels` over `away_labels` (2407.15549, backdoors).
        steps (`int`, *optional*, defaults to `16`):
            Steps of the search.
        learning_rate (`float`, *optional*, defaults to `5e-2`):
            Learning rate of `"adamw"` and `"sign"`. The steepest direction has its own step, `2.5 * radius / steps`.
        optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"`, `"steepest"` (the steepest direction of the norm, lat.md 2.4) or `"sign"` (the sign of the
            gradient in every coordinate, 2405.15589), each followed by projection.
        toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the toward term.
        away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the away term.
        init (`str`, *optional*, defaults to `"zero"`):
            `"zero"`, `"random"`: uniform in the ball, or `"warm"`: at `start`.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of AdamW.
        generator (`torch.Generator`, *optional*):
            Source of randomness for `"random"`, on the CPU.
        preference ([`~trl_robust.objectives.PreferenceLoss`], *optional*):
            What `"swapped"` minimises; the sigmoid loss with beta 0.1 if not given.
        start (`Mapping[Site, torch.Tensor]`, *optional*):
            For `init="warm"`: tensors of shape `(P, H)` by rank, the same for every row; sites without one start at
            zero.
        num_sites (`int`, *optional*):
            Attack only so many of the threat's sites: those where the loss falls most, to first order, when the ball
            is used up (our choice of layers; costs one step over all sites).

    Returns:
        [`Perturbation`] with `deltas`, `losses`, `boundary_fraction`, `norms` and `forward_passes`.

    Raises:
        `ValueError`: an unknown choice, a missing key, or a batch without a token to perturb.
        `FloatingPointError`: the loss has a gradient that is not finite.

    Example:

    ```python
    >>> threat = ThreatModel([0.5], radius=0.2, radius_unit="relative")
    >>> worst = find_perturbation(model, batch, threat, steps=8)
    >>> with worst.installed(model):
    ...     attacked = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ```
    """
    _check_choices(objective, optimizer, init, steps)
    terms = attack_terms(batch, objective, toward_coef, away_coef, preference)
    with torch.enable_grad(), attack_mode(model):
        passes = 0.0
        if threat.radius_unit == "relative":
            threat = threat.calibrated(median_norms(model, [batch], threat))
            passes += batch["input_ids"].shape[0]
        search = Search(model, terms, threat)
        if num_sites is not None and num_sites < len(search.sites):
            gains = search.gains()
            passes += search.passes
            search = Search(model, terms, replace(threat, sites=sorted(gains, key=lambda s: -gains[s])[:num_sites]))
        if objective == "random":
            losses = [search.loss()]
            search.draw(generator, on_boundary=True)
        else:
            if init == "random":
                search.draw(generator)
            elif init == "warm":
                search.start_at(start or {})
            if optimizer == "steepest":
                losses = search.steepest(steps)
            else:
                if init == "zero":  # any other start may be near the boundary already
                    search.warn_if_not_binding(steps, learning_rate)
                losses = (
                    search.adamw(steps, learning_rate, weight_decay)
                    if optimizer == "adamw"
                    else search.signed(steps, learning_rate)
                )
        losses.append(search.loss())
    return search.result(torch.stack(losses).tolist(), passes)


def _check_choices(objective: str, optimizer: str, init: str, steps: int) -> None:
    for name, value, choices in (
        ("objective", objective, Objective),
        ("optimizer", optimizer, Optimizer),
        ("init", init, Init),
    ):
        if value not in get_args(choices):
            raise ValueError(f"`{name}` is {value!r}; choose one of {list(get_args(choices))}.")
    if steps < 0:
        raise ValueError(f"`steps` is {steps}; it must be at least 0.")
