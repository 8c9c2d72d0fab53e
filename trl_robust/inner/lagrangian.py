"""LAP's inner problem as such: the longest perturbation that leaves a loss within epsilon (2503.01345, Eq. 3 and 6-8).

It knows nothing of models: it is given a function from perturbations to a loss for every row. Rows do not influence
one another; each has a multiplier of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..threat.sites import Site
from .lagrangian_settings import LagrangianSettings

BACKOFF_PASSES = 6
"""Forward passes that backing off to feasibility may take."""

CLOSE = 0.75
"""A feasible length that is this share of an infeasible one is close enough to the border."""

Deltas = Mapping[Site, torch.Tensor]


@dataclass
class Found:
    """
    What a constrained search came to.

    Args:
        deltas (`dict[Site, torch.Tensor]`):
            The perturbations, each of shape `(B, P, H)`.
        log_lambda (`torch.Tensor` of shape `(B,)`):
            Logarithms of the multipliers.
        losses (`torch.Tensor` of shape `(B,)`):
            The loss under them.
        feasible (`torch.Tensor` of shape `(B,)`):
            Whether it is within epsilon of the clean one.
        scales (`torch.Tensor` of shape `(B,)`):
            Length at the end, over that after the last step: below 1 where a row was shortened to be feasible.
        nonfinite (`torch.Tensor` of shape `(B,)`):
            Rows that were given up, at the longest feasible perturbation they had, since something was not finite.
        records (`dict[str, torch.Tensor]`):
            What was measured before every step, each of shape `(steps, B)`.
    """

    deltas: dict[Site, torch.Tensor]
    log_lambda: torch.Tensor
    losses: torch.Tensor
    feasible: torch.Tensor
    scales: torch.Tensor
    nonfinite: torch.Tensor
    records: dict[str, torch.Tensor]


class ConstrainedSearch:
    """
    The alternating descent in the perturbation and ascent in the multiplier.

    Args:
        row_losses (`Callable`):
            From perturbations to a loss for every row, of shape `(B,)`, part of the graph.
        clean (`torch.Tensor` of shape `(B,)`):
            The loss without a perturbation, `J0`.
        start (`Mapping[Site, torch.Tensor]`):
            Perturbations of shape `(B, P, H)` to start from.
        selected (`torch.Tensor` of shape `(B, P)`):
            Ranks that may be perturbed.
        epsilon (`float`):
            How far the loss may move.
        settings ([`LagrangianSettings`]):
            How the search is made.
        caps (`Mapping[Site, torch.Tensor]`, *optional*):
            Bound of the L2 norm at every rank, of shape `(B, P)`.
        log_lambda (`float`, *optional*):
            Logarithm of the multiplier to begin with, in place of the settings' own.
        starts_clean (`bool`, *optional*, defaults to `False`):
            Whether the start is so near zero that the loss there counts as the clean one. The first step then follows
            the norm alone, as the paper's curves do, and costs no pass.
        losses_of (`Callable`, *optional*):
            As `row_losses` without a graph, for some rows: from perturbations of all rows and the numbers of those
            that are asked for to their losses. Makes backing off cost only what the shortened rows cost.
    """

    def __init__(
        self,
        row_losses: Callable[[Deltas], torch.Tensor],
        clean: torch.Tensor,
        start: Mapping[Site, torch.Tensor],
        selected: torch.Tensor,
        *,
        epsilon: float,
        settings: LagrangianSettings,
        caps: Mapping[Site, torch.Tensor] | None = None,
        log_lambda: float | None = None,
        starts_clean: bool = False,
        losses_of: Callable[[Deltas, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.starts_clean, self.losses_of = starts_clean, losses_of
        self.row_losses, self.clean, self.epsilon, self.settings = row_losses, clean.detach(), epsilon, settings
        self.mask = selected.unsqueeze(-1)
        self.deltas: dict[Site, torch.Tensor] = {
            site: (delta.detach() * self.mask).requires_grad_() for site, delta in start.items()
        }
        self.caps = caps if settings.token_cap < math.inf else None
        if log_lambda is None:
            log_lambda = math.log(settings.lambda_init) if settings.lambda_init > 0 else -math.inf
        self.log_lambda = torch.full_like(self.clean, log_lambda)
        tokens = selected.sum(-1).clamp(min=1).to(self.clean)
        coordinates = sum(delta.shape[-1] for delta in self.deltas.values())
        self.tokens, self.coordinates = tokens, tokens * coordinates
        self.nonfinite = torch.zeros_like(self.clean, dtype=torch.bool)
        # Zero is feasible: it is what a row falls back to when nothing longer was.
        self.best = [torch.zeros_like(delta) for delta in self.deltas.values()]
        self.best_length = torch.zeros_like(self.clean)
        self.best_loss = self.clean.clone()
        self.shortest_infeasible = torch.full_like(self.clean, math.inf)
        self._records: dict[str, list[torch.Tensor]] = {}
        leaves = list(self.deltas.values())
        self._adamw = (
            torch.optim.AdamW(leaves, lr=settings.learning_rate, weight_decay=0.0)
            if settings.optimizer == "adamw"
            else None
        )

    def run(self, steps: int) -> Found:
        """
        Makes so many steps.

        Args:
            steps (`int`):
                Steps of the perturbation, each followed by one of the multiplier.

        Returns:
            [`Found`].
        """
        losses = self.clean if self.starts_clean else self._losses(graph=steps > 0)
        for number in range(steps):
            gradients = self._loss_gradients(losses)
            self._step(losses.detach(), gradients)
            # This pass serves the multiplier now and the next step's gradient after that (lap.md 5).
            losses = self._losses(graph=number < steps - 1)
            self._move_multiplier(losses.detach(), number)
            self._keep_if_best(losses.detach())
        return self._finish(losses.detach())

    def _losses(self, *, graph: bool) -> torch.Tensor:
        with torch.set_grad_enabled(graph):
            return self.row_losses(self.deltas)

    def _loss_gradients(self, losses: torch.Tensor) -> list[torch.Tensor]:
        if not losses.requires_grad:  # at a start that counts as clean
            return [torch.zeros_like(delta) for delta in self.deltas.values()]
        found = torch.autograd.grad(losses.sum(), list(self.deltas.values()))
        return [gradient * self.mask for gradient in found]

    # The perturbation

    def _step(self, losses: torch.Tensor, of_loss: list[torch.Tensor]) -> None:
        settings = self.settings
        change = losses - self.clean
        violation = change.abs() - self.epsilon
        multiplier = self.log_lambda.exp()
        pull = (multiplier + settings.augmented * violation.clamp(min=0)) * change.sign()
        if settings.damped:
            # To first order, no step along the loss gradient goes beyond the far side of what is allowed.
            reach = settings.learning_rate * _row_length(of_loss).square().clamp(min=1e-30)
            pull = torch.minimum(pull.abs(), (change.abs() + self.epsilon) / reach) * pull.sign()
        of_norm = self._norm_gradients()
        gradients = [
            -settings.norm_weight * norm_part + _by_row(pull, loss_part) * loss_part
            for norm_part, loss_part in zip(of_norm, of_loss, strict=True)
        ]
        lengths = _row_length(gradients)
        broken = ~(lengths.isfinite() & losses.isfinite() & self.log_lambda.nan_to_num(neginf=0.0).isfinite())
        self.nonfinite |= broken
        gradients = [torch.where(_by_row(self.nonfinite, part), 0.0, part) for part in gradients]
        capped = torch.zeros_like(self.clean)
        if settings.clip:
            limit = settings.norm_weight * _row_length(of_norm)
            factor = (limit / lengths.clamp(min=1e-30)).clamp(max=1.0).nan_to_num()
            gradients = [_by_row(factor, part) * part for part in gradients]
        self._record(losses, change, violation, multiplier, of_loss, pull)
        if self._adamw is not None:
            for delta, part in zip(self.deltas.values(), gradients, strict=True):
                delta.grad = part
            self._adamw.step()
            self._adamw.zero_grad()
        else:
            for delta, part in zip(self.deltas.values(), gradients, strict=True):
                delta.detach().sub_(settings.learning_rate * part)
        for (site, delta), best in zip(self.deltas.items(), self.best, strict=True):
            moved = delta.detach() * self.mask
            if self.caps is not None:
                lengths_of_tokens = torch.linalg.vector_norm(moved, dim=-1)
                factor = (self.caps[site] / lengths_of_tokens.clamp(min=1e-30)).clamp(max=1.0)
                capped += ((factor < 1) & self.mask[..., 0]).sum(-1) / self.tokens / len(self.deltas)
                moved = moved * factor.unsqueeze(-1)
            delta.detach().copy_(torch.where(_by_row(self.nonfinite, moved), best, moved))
        self._note("capped_share", capped)

    def _norm_gradients(self) -> list[torch.Tensor]:
        """Gradient of the norm in every perturbation; 0 where it is 0."""
        leaves = [delta.detach() for delta in self.deltas.values()]
        if self.settings.norm == "l2_token_mean":
            return [
                leaf
                / torch.linalg.vector_norm(leaf, dim=-1, keepdim=True).clamp(min=1e-30)
                / _by_row(self.tokens * len(leaves), leaf)
                for leaf in leaves
            ]
        length = _row_length(leaves).clamp(min=1e-30)
        if self.settings.norm == "rms":
            length = length * self.coordinates.sqrt()
        return [leaf / _by_row(length, leaf) for leaf in leaves]

    def _norms(self) -> torch.Tensor:
        leaves = [delta.detach() for delta in self.deltas.values()]
        if self.settings.norm == "l2_token_mean":
            lengths = torch.stack([torch.linalg.vector_norm(leaf, dim=-1).sum(-1) for leaf in leaves])
            return lengths.sum(0) / self.tokens / len(leaves)
        length = _row_length(leaves)
        return length / self.coordinates.sqrt() if self.settings.norm == "rms" else length

    # The multiplier

    def _move_multiplier(self, losses: torch.Tensor, number: int) -> None:
        settings = self.settings
        clamped = torch.zeros_like(self.clean)
        if not (number == 0 and settings.skip_first_update):
            change = losses - self.clean
            violation = (change if settings.violation == "signed" else change.abs()) - self.epsilon
            step = settings.alpha * self.log_lambda.exp() * violation
            bounded = step.clamp(-settings.max_log_step, settings.max_log_step)
            moved = self.log_lambda + bounded
            low = math.log(settings.lambda_min) if settings.lambda_min > 0 else -math.inf
            kept = moved.clamp(low, math.log(settings.lambda_max) if settings.lambda_max < math.inf else math.inf)
            clamped = ((bounded != step) | (kept != moved)).to(clamped)
            # A multiplier of 0 stays one; rows that were given up keep theirs.
            fixed = self.nonfinite | (self.log_lambda == -math.inf)
            self.log_lambda = torch.where(fixed, self.log_lambda, kept)
        self._note("lambda_clamped", clamped)

    # Feasibility

    def _feasible(self, losses: torch.Tensor) -> torch.Tensor:
        return (losses - self.clean).abs() <= self.epsilon

    def _keep_if_best(self, losses: torch.Tensor) -> None:
        length = self._norms()
        better = self._feasible(losses) & (length > self.best_length) & ~self.nonfinite
        for kept, delta in zip(self.best, self.deltas.values(), strict=True):
            kept.copy_(torch.where(_by_row(better, kept), delta.detach(), kept))
        self.best_length = torch.where(better, length, self.best_length)
        self.best_loss = torch.where(better, losses, self.best_loss)
        shorter = torch.minimum(length, self.shortest_infeasible)
        self.shortest_infeasible = torch.where(self._feasible(losses), self.shortest_infeasible, shorter)

    def _finish(self, losses: torch.Tensor) -> Found:
        scales = torch.ones_like(self.clean)
        broken = ~losses.isfinite() & ~self.nonfinite  # in the very last pass
        self.nonfinite |= broken
        for delta, best in zip(self.deltas.values(), self.best, strict=True):
            delta.detach().copy_(torch.where(_by_row(broken, best), best, delta.detach()))
        if self.settings.backoff:
            losses, scales = self._back_off(losses)
        losses = torch.where(self.nonfinite, self.best_loss, losses)
        records = {name: torch.stack(values) for name, values in self._records.items()}
        deltas = {site: delta.detach() for site, delta in self.deltas.items()}
        feasible = self._feasible(losses)
        return Found(deltas, self.log_lambda, losses, feasible, scales, self.nonfinite, records)

    def _back_off(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shortens what violates the constraint until it does not; then the longest feasible of the search wins."""
        whole = [delta.detach().clone() for delta in self.deltas.values()]
        length = self._norms()
        fits = self._feasible(losses)
        # Where the search itself has come close to the border from within, no pass is spent on coming closer.
        seeking = ~fits & ~self.nonfinite & (self.best_length < CLOSE * self.shortest_infeasible)
        change = (losses - self.clean).abs().clamp(min=1e-30)
        low, high = fits.to(self.clean), torch.ones_like(self.clean)
        low_loss = torch.where(fits, losses, self.clean)
        # The loss goes with a power of the length, between 1 and 2 as long as nothing is known.
        power, scale, before = torch.full_like(change, 1.5), torch.ones_like(change), change
        for _ in range(BACKOFF_PASSES):
            reached = ((low_loss - self.clean).abs() >= 0.5 * self.epsilon) | (low >= CLOSE * high)
            open_still = seeking & ~reached
            if not bool(open_still.any()):
                break
            guess = scale * (0.8 * self.epsilon / before) ** (1 / power)
            inside = guess.nan_to_num(0.0).clamp(low + 0.05 * (high - low), high - 0.05 * (high - low))
            tried = torch.where(open_still, inside, low)
            self._put(whole, tried)
            found = low_loss.clone()
            if self.losses_of is None:
                found = self._losses(graph=False)
            else:
                rows = open_still.nonzero().flatten()
                with torch.no_grad():
                    found[rows] = self.losses_of(self.deltas, rows)
            now = (found - self.clean).abs().clamp(min=1e-30)
            power = torch.where(
                open_still, ((change / now).log() / -tried.log()).nan_to_num(1.5).clamp(0.5, 4.0), power
            )
            scale, before = torch.where(open_still, tried, scale), torch.where(open_still, now, before)
            fits = self._feasible(found)
            low, low_loss = torch.where(fits, tried, low), torch.where(fits, found, low_loss)
            high = torch.where(open_still & ~fits, tried, high)
        self._put(whole, low)
        use_best = self.best_length > low * length
        for delta, best in zip(self.deltas.values(), self.best, strict=True):
            delta.detach().copy_(torch.where(_by_row(use_best, best), best, delta.detach()))
        scales = torch.where(use_best, self.best_length / length.clamp(min=1e-30), low)
        return torch.where(use_best, self.best_loss, low_loss), scales

    def _put(self, whole: list[torch.Tensor], scale: torch.Tensor) -> None:
        for delta, part in zip(self.deltas.values(), whole, strict=True):
            delta.detach().copy_(_by_row(scale, part) * part)

    # What a person watches

    def _note(self, name: str, values: torch.Tensor) -> None:
        self._records.setdefault(name, []).append(values)

    def _record(
        self,
        losses: torch.Tensor,
        change: torch.Tensor,
        violation: torch.Tensor,
        multiplier: torch.Tensor,
        of_loss: list[torch.Tensor],
        pull: torch.Tensor,
    ) -> None:
        settings = self.settings
        leaves = [delta.detach() for delta in self.deltas.values()]
        length, slope = _row_length(leaves), _row_length(of_loss)
        inner = sum(_row_sum(leaf * part) for leaf, part in zip(leaves, of_loss, strict=True))
        energy = torch.cat([leaf.square().sum(-1) for leaf in leaves], dim=1).sort(-1, descending=True).values
        total = energy.sum(-1).clamp(min=1e-30)
        top = torch.arange(energy.shape[1], device=energy.device) < (0.1 * self.tokens * len(leaves)).ceil()[:, None]
        norms = self._norms()
        lagrangian = -settings.norm_weight * norms + multiplier * violation
        lagrangian = lagrangian + 0.5 * settings.augmented * violation.clamp(min=0).square()
        for name, values in {
            "lambda": multiplier,
            "norm": norms,
            "length": length,
            "token_norm": sum(torch.linalg.vector_norm(leaf, dim=-1).sum(-1) for leaf in leaves)
            / (self.tokens * len(leaves)),
            "loss": losses,
            "loss_change": change,
            "loss_change_abs": change.abs(),
            "violation": violation,
            "feasible": self._feasible(losses).to(losses),
            "lagrangian": lagrangian,
            "loss_gradient": pull.abs() * slope,
            "norm_gradient": settings.norm_weight * _row_length(self._norm_gradients()),
            "cosine": inner / (length * slope).clamp(min=1e-30),
            "top1_share": energy[:, 0] / total,
            "top10_share": (energy * top).sum(-1) / total,
        }.items():
            self._note(name, values)


def _row_sum(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(-1)


def _row_length(parts: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm of a row over all its parts."""
    return torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=-1) for part in parts]).norm(dim=0)


def _by_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
