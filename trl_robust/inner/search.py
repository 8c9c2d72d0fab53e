"""The state of a search for a perturbation, and the steps it can take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import nn

from ..objectives import label_logits
from ..threat.balls import Ball, Norm, boundary_fraction, project, random_point, steepest, vector_norms
from ..threat.model import ThreatModel
from ..threat.sites import Site, base_model
from .injection import CachedPrefix, Perturbation
from .terms import Term, selected_by

STEEPEST_REACH = 2.5
"""A steepest-direction step is this times radius / steps long, so that the boundary is in reach (lat.md 2.4)."""

DUAL: dict[Norm, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}


class _Ball(TypedDict):
    norm: Norm
    ball: Ball
    mask: torch.Tensor


class NonBindingRadiusWarning(UserWarning):
    """The attack cannot get as far as the radius allows, so the radius does not matter."""


class Search:
    """
    State of a search: the deltas as leaves of the graph, the terms of the loss, the cost so far.

    Args:
        model (`nn.Module`):
            The model, outside distributed wrappers, in [`attack_mode`].
        terms (sequence of [`Term`]):
            What is minimised.
        threat ([`ThreatModel`]):
            Where and how far, with an absolute radius.

    Raises:
        `ValueError`: no token of the batch may be perturbed.
    """

    def __init__(self, model: nn.Module, terms: Sequence[Term], threat: ThreatModel) -> None:
        self.model, self.threat = model, threat
        self.selected = selected_by(terms, threat.positions)
        if not self.selected.any():
            raise ValueError(
                f"No token of the batch may be perturbed with positions={threat.positions!r}: the rows have none "
                "there. Choose other positions, or check the prompts."
            )
        self.sites = threat.resolve_sites(model)
        self.shape = (*self.selected.shape, base_model(model).config.get_text_config().hidden_size)
        self.ball: _Ball = {"norm": threat.norm, "ball": threat.ball, "mask": self.selected}
        device = terms[0].batch["input_ids"].device
        deltas = {site: torch.zeros(self.shape, device=device, requires_grad=True) for site in self.sites}
        self.perturbation = Perturbation(deltas, self.selected, threat.stream)
        # What lies below the first perturbed place does not change during the search. An MLP's own layer is not
        # below it; with the embedding perturbed nothing is.
        first = self.sites[0]
        last_cached = -1 if first == "embedding" else int(first) - (threat.stream == "mlp")
        self.terms = [(term, CachedPrefix(model, last_cached)) for term in terms]
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

    def start_at(self, start: Mapping[Site, torch.Tensor]) -> None:
        """Puts a perturbation of shape `(P, H)`, the same for every row, into the deltas of the sites it has."""
        for site, delta in self.deltas.items():
            if site not in start:
                continue
            width = min(self.shape[1], start[site].shape[0])
            leaf = delta.detach()
            leaf[:, :width] = start[site][:width].to(delta.device) * self.selected[:, :width].unsqueeze(-1)
            leaf.copy_(project(leaf, radius=self.threat.radius_at(site), **self.ball))

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
            for delta in self.deltas.values():
                delta.grad = None
            self._move()
        return losses

    def signed(self, steps: int, learning_rate: float) -> list[torch.Tensor]:
        """Steps of the learning rate in every coordinate (2405.15589); returns the loss before every step."""
        losses = []
        for _ in range(steps):
            loss, gradients = self.loss_and_gradients()
            losses.append(loss)
            self._move({site: learning_rate * grad.sign() for site, grad in zip(self.sites, gradients, strict=True)})
        return losses

    def steepest(self, steps: int) -> list[torch.Tensor]:
        """Steepest-descent steps, each followed by projection; returns the loss before every step."""
        losses = []
        for _ in range(steps):
            loss, gradients = self.loss_and_gradients()
            losses.append(loss)
            self._move(
                {
                    site: STEEPEST_REACH * self.threat.radius_at(site) / steps * steepest(gradient, **self.ball)
                    for site, gradient in zip(self.sites, gradients, strict=True)
                }
            )
        return losses

    def _move(self, steps: Mapping[Site, torch.Tensor] | None = None) -> None:
        """Subtracts a step from every delta, if there is one to take still, and projects."""
        for site, delta in self.deltas.items():
            moved = delta.detach() if steps is None else delta.detach() - steps[site]
            delta.detach().copy_(project(moved, radius=self.threat.radius_at(site), **self.ball))

    def loss(self) -> torch.Tensor:
        """The attack's loss as it stands: mean over rows, a scalar."""
        with torch.no_grad():
            losses = []
            for term, prefix in self.terms:
                with self.perturbation.installed(self.model, copies=term.copies):
                    losses.append(self._row_losses(term, prefix).sum())
            return torch.stack(losses).sum() / self.shape[0]

    def loss_and_gradients(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The attack's loss, and the gradient of its sum over rows in every delta."""
        total = torch.zeros((), device=self.selected.device)
        gradients = [torch.zeros_like(delta) for delta in self.deltas.values()]
        # Term by term: only one graph lives at a time, and a recomputed region meets the ranks of its own pass.
        for term, prefix in self.terms:
            # Installed until the backward pass is done: under checkpointing an MLP's hook has to run again there.
            with self.perturbation.installed(self.model, copies=term.copies):
                loss = self._row_losses(term, prefix).sum()
                parts = torch.autograd.grad(loss, list(self.deltas.values()))
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.add_(part)
            # Back to the perturbation, not below it.
            self.passes += term.batch["input_ids"].shape[0] * prefix.share_run
            total += loss.detach()
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise FloatingPointError(
                "The attack's loss has a gradient that is not finite. Look for rows on which the model's own loss is "
                "not finite, or run the model in bfloat16 or float32 instead of float16."
            )
        return total / self.shape[0], gradients

    def _row_losses(self, term: Term, prefix: CachedPrefix) -> torch.Tensor:
        batch = term.batch
        self.passes += batch["input_ids"].shape[0] * prefix.share_run
        with prefix.resume_from():
            found = label_logits(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
        return term.row_losses(found)

    def gains(self) -> dict[Site, float]:
        """
        What each site offers to first order: how far the loss falls, mean over rows, when its ball is used up.

        That is the radius times the dual norm of the gradient, summed over the balls of a row.
        """
        _, gradients = self.loss_and_gradients()
        dual: _Ball = {**self.ball, "norm": DUAL[self.threat.norm]}
        return {
            site: (self.threat.radius_at(site) * vector_norms(gradient, **dual).sum() / self.shape[0]).item()
            for site, gradient in zip(self.sites, gradients, strict=True)
        }

    def warn_if_not_binding(self, steps: int, learning_rate: float) -> None:
        """Warns when steps that move a coordinate by about the learning rate cannot reach the boundary."""
        dimension = self.shape[-1]
        if self.threat.ball == "sequence":
            dimension *= int(self.selected.sum(-1).max())
        per_coordinate = steps * learning_rate
        reach = per_coordinate * {"l1": dimension, "l2": dimension**0.5, "linf": 1.0}[self.threat.norm]
        for site in self.sites:
            radius = self.threat.radius_at(site)
            if steps > 0 and reach < radius:
                warnings.warn(
                    f"The radius {radius:.4g} at {site} cannot bind: {steps} steps at learning rate "
                    f"{learning_rate:.4g} reach about {reach:.4g} ({self.threat.norm}). The attack is as strong as "
                    "its steps allow, and any larger radius gives the same result. Raise the attack's learning rate "
                    "or its steps, or use the steepest optimizer.",
                    NonBindingRadiusWarning,
                    stacklevel=3,
                )

    def result(self, losses: list[float], passes: float) -> Perturbation:
        """The perturbation found, with what is to be known of it; `passes` is what was spent outside the search."""
        found = self.perturbation
        found.losses = losses
        found.forward_passes = passes + self.passes
        for site, leaf in self.deltas.items():
            delta = found.deltas[site] = leaf.detach()
            found.boundary_fraction[site] = boundary_fraction(delta, radius=self.threat.radius_at(site), **self.ball)
            lengths = vector_norms(delta, "l2", mask=self.selected)
            found.norms[site] = (lengths.sum() / self.selected.sum()).item()
        return found
