"""Projected gradient descent on hidden states: the worst perturbation that a threat model allows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, TypedDict, get_args

import torch
from torch import nn

from ..objectives import LabelLogits, away, label_logits, toward
from ..threat.balls import Ball, Norm, boundary_fraction, project, random_point, steepest, vector_norms
from ..threat.model import ThreatModel
from ..threat.positions import selected_ranks
from ..threat.sites import Site, base_model
from .injection import CachedPrefix, Perturbation, attack_mode
from .norms import median_norms

Objective = Literal["targeted", "untargeted", "random"]
Optimizer = Literal["adamw", "steepest"]
Init = Literal["zero", "random"]

STEEPEST_REACH = 2.5
"""A steepest-direction step is this times radius / steps long, so that the boundary is in reach (lat.md 2.4)."""


class _Ball(TypedDict):
    norm: Norm
    ball: Ball
    mask: torch.Tensor


class NonBindingRadiusWarning(UserWarning):
    """The attack cannot get as far as the radius allows, so the radius does not matter."""


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
            completions it pushes away from. Row `i` of both has the same prompt and shares one perturbation.
        threat ([`ThreatModel`]):
            Where and how far. A relative radius is measured on this batch.
        objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"` minimises `toward_coef * CE(labels) + away_coef * W(away_labels)` (2407.15549, Eq. 3),
            `"untargeted"` maximises the cross-entropy of `labels`, the wanted completions (2403.05030), and
            `"random"` draws a random point of the boundary: the control.
        steps (`int`, *optional*, defaults to `16`):
            Steps of the search.
        learning_rate (`float`, *optional*, defaults to `5e-2`):
            Learning rate of AdamW. The steepest direction has its own step, `2.5 * radius / steps`.
        optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"` or `"steepest"` (the steepest direction of the norm, lat.md 2.4), each followed by projection.
        toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the toward term.
        away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the away term.
        init (`str`, *optional*, defaults to `"zero"`):
            `"zero"`, or `"random"`: uniform in the ball.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay of AdamW.
        generator (`torch.Generator`, *optional*):
            Source of randomness for `"random"`, on the CPU.

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
    shares = _shares(batch, objective, toward_coef, away_coef)
    selected = _union([selected_ranks(part, threat.positions) for part, _, _ in shares])
    if not selected.any():
        raise ValueError(
            f"No token of the batch may be perturbed with positions={threat.positions!r}: the rows have none there. "
            "Choose other positions, or check the prompts."
        )
    with torch.enable_grad(), attack_mode(model):
        passes = 0.0
        if threat.radius_unit == "relative":
            threat = threat.calibrated(median_norms(model, [batch], threat))
            passes += batch["input_ids"].shape[0]
        search = _Search(model, shares, threat, selected, batch["input_ids"].device)
        if objective == "random":
            losses = [search.loss()]
            search.draw(generator, on_boundary=True)
        else:
            if init == "random":
                search.draw(generator)
            if optimizer == "adamw":
                if init == "zero":  # a random start is on the boundary already, or nearly
                    search.warn_if_not_binding(steps, learning_rate)
                losses = search.adamw(steps, learning_rate, weight_decay)
            else:
                losses = search.steepest(steps)
        losses.append(search.loss())
    return search.result(torch.stack(losses).tolist(), passes)


class _Share:
    """One of the batches a search looks at: the completions it goes toward, or those it goes away from."""

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor], last_cached: int) -> None:
        self.batch = batch
        self.prefix = CachedPrefix(model, last_cached)

    def logits(self, model: nn.Module) -> LabelLogits:
        with self.prefix.resume_from():
            return label_logits(model, self.batch["input_ids"], self.batch["attention_mask"], self.batch["labels"])


class _Search:
    """State of a search: the deltas as leaves of the graph, the shares of the loss, the cost so far."""

    def __init__(
        self,
        model: nn.Module,
        shares: list[tuple[Mapping[str, torch.Tensor], float, bool]],
        threat: ThreatModel,
        selected: torch.Tensor,
        device: torch.device,
    ) -> None:
        self.model, self.threat, self.selected = model, threat, selected
        self.sites = threat.resolve_sites(model)
        self.shape = (*selected.shape, base_model(model).config.get_text_config().hidden_size)
        self.ball: _Ball = {"norm": threat.norm, "ball": threat.ball, "mask": selected}
        deltas = {site: torch.zeros(self.shape, device=device, requires_grad=True) for site in self.sites}
        self.perturbation = Perturbation(deltas, selected, threat.stream)
        # What lies below the first perturbed place does not change during the search. An MLP's own layer is not
        # below it; with the embedding perturbed nothing is.
        first = self.sites[0]
        last_cached = -1 if first == "embedding" else int(first) - (threat.stream == "mlp")
        self.shares = [(_Share(model, batch, last_cached), weight, is_away) for batch, weight, is_away in shares]
        self.passes = 0.0

    @property
    def deltas(self) -> dict[Site, torch.Tensor]:
        return self.perturbation.deltas

    def draw(self, generator: torch.Generator | None, on_boundary: bool = False) -> None:
        """Puts a random point of the ball into every delta."""
        for site, delta in self.deltas.items():
            point = random_point(
                self.shape,
                radius=self.threat.radius_at(site),
                on_boundary=on_boundary,
                generator=generator,
                device=delta.device,
                **self.ball,
            )
            delta.detach().copy_(point)

    def adamw(self, steps: int, learning_rate: float, weight_decay: float) -> list[torch.Tensor]:
        """AdamW steps, each followed by projection; returns the loss before every step."""
        optimizer = torch.optim.AdamW(self.deltas.values(), lr=learning_rate, weight_decay=weight_decay)
        losses = []
        for _ in range(steps):
            loss, gradients = self.loss_and_gradients()
            losses.append(loss)
            for delta, gradient in zip(self.deltas.values(), gradients, strict=True):
                delta.grad = gradient
            optimizer.step()
            for site, delta in self.deltas.items():
                delta.grad = None
                delta.detach().copy_(project(delta.detach(), radius=self.threat.radius_at(site), **self.ball))
        return losses

    def steepest(self, steps: int) -> list[torch.Tensor]:
        """Steepest-descent steps, each followed by projection; returns the loss before every step."""
        losses = []
        for _ in range(steps):
            loss, gradients = self.loss_and_gradients()
            losses.append(loss)
            for (site, delta), gradient in zip(self.deltas.items(), gradients, strict=True):
                radius = self.threat.radius_at(site)
                moved = delta.detach() - STEEPEST_REACH * radius / steps * steepest(gradient, **self.ball)
                delta.detach().copy_(project(moved, radius=radius, **self.ball))
        return losses

    def loss(self) -> torch.Tensor:
        """The attack's loss as it stands: mean over rows, a scalar."""
        with torch.no_grad():
            losses = []
            for share in self.shares:
                with self.perturbation.installed(self.model):
                    losses.append(self._row_losses(*share).sum())
            return torch.stack(losses).sum() / self.shape[0]

    def loss_and_gradients(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The attack's loss, and the gradient of its sum over rows in every delta."""
        total = torch.zeros((), device=self.selected.device)
        gradients = [torch.zeros_like(delta) for delta in self.deltas.values()]
        # Share by share: only one graph lives at a time, and a recomputed region meets the ranks of its own pass.
        for share, weight, is_away in self.shares:
            # Installed until the backward pass is done: under checkpointing an MLP's hook has to run again there.
            with self.perturbation.installed(self.model):
                loss = self._row_losses(share, weight, is_away).sum()
                parts = torch.autograd.grad(loss, list(self.deltas.values()))
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.add_(part)
            self.passes += self.shape[0] * share.prefix.share_run  # back to the perturbation, not below it
            total += loss.detach()
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise FloatingPointError(
                "The attack's loss has a gradient that is not finite. Look for rows on which the model's own loss is "
                "not finite, or run the model in bfloat16 or float32 instead of float16."
            )
        return total / self.shape[0], gradients

    def _row_losses(self, share: _Share, weight: float, is_away: bool) -> torch.Tensor:
        self.passes += self.shape[0] * share.prefix.share_run
        found = share.logits(self.model)
        values = (away if is_away else toward)(found.logits, found.targets)
        return weight * found.row_means(values)

    def warn_if_not_binding(self, steps: int, learning_rate: float) -> None:
        """Warns when AdamW, which moves a coordinate by about its learning rate a step, cannot reach the boundary."""
        dimension = self.shape[-1]
        if self.threat.ball == "sequence":
            dimension *= int(self.selected.sum(-1).max())
        per_coordinate = steps * learning_rate
        reach = per_coordinate * {"l1": dimension, "l2": dimension**0.5, "linf": 1.0}[self.threat.norm]
        for site in self.sites:
            radius = self.threat.radius_at(site)
            if steps > 0 and reach < radius:
                warnings.warn(
                    f"The radius {radius:.4g} at {site} cannot bind: {steps} steps of AdamW at learning rate "
                    f"{learning_rate:.4g} reach about {reach:.4g} ({self.threat.norm}). The attack is as strong as "
                    "its steps allow, and any larger radius gives the same result. Raise the attack's learning rate "
                    "or its steps, or use the steepest optimizer.",
                    NonBindingRadiusWarning,
                    stacklevel=3,
                )

    def result(self, losses: list[float], passes: float) -> Perturbation:
        found = self.perturbation
        found.losses = losses
        found.forward_passes = passes + self.passes
        for site, leaf in self.deltas.items():
            delta = found.deltas[site] = leaf.detach()
            found.boundary_fraction[site] = boundary_fraction(delta, radius=self.threat.radius_at(site), **self.ball)
            lengths = vector_norms(delta, "l2", mask=self.selected)
            found.norms[site] = (lengths.sum() / self.selected.sum()).item()
        return found


def _shares(
    batch: Mapping[str, torch.Tensor], objective: str, toward_coef: float, away_coef: float
) -> list[tuple[Mapping[str, torch.Tensor], float, bool]]:
    """The parts of the loss: (batch, weight, whether it is an away term). The attack minimises their sum."""
    if missing := [key for key in ("input_ids", "attention_mask", "labels") if key not in batch]:
        raise ValueError(f"The batch lacks {missing}.")
    if objective == "untargeted":
        if away_coef:
            raise ValueError("`away_coef` belongs to the targeted attack; set it to 0 with objective='untargeted'.")
        return [(batch, -toward_coef, False)]
    shares: list[tuple[Mapping[str, torch.Tensor], float, bool]] = []
    if toward_coef:
        shares.append((batch, toward_coef, False))
    if away_coef:
        keys = ("input_ids", "attention_mask", "labels", "last_user_span")
        pushed = {key: batch[f"away_{key}"] for key in keys if f"away_{key}" in batch}
        if missing := [f"away_{key}" for key in keys[:3] if key not in pushed]:
            raise ValueError(f"`away_coef` is {away_coef}, but the batch lacks {missing}.")
        if "last_user_span" in batch:
            pushed.setdefault("last_user_span", batch["last_user_span"])
        shares.append((pushed, away_coef, True))
    if not shares:
        raise ValueError("`toward_coef` and `away_coef` are both 0: the attack has nothing to minimise.")
    return shares


def _union(masks: list[torch.Tensor]) -> torch.Tensor:
    """Ranks selected in any share, as wide as the widest."""
    width = max(mask.shape[1] for mask in masks)
    padded = [torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks]
    return torch.stack(padded).any(0)


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
