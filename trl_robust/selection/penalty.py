"""The penalised problem (seal.md 1 to 3): what each of the two models minimises, and what moves the selector.

`min (1 - gamma) F(theta) + gamma [G(w, theta) - min G(w, .)]`: F is the mean loss on the safe set, G the mean loss on
the data, weighted. `theta` minimises the first two terms; the auxiliary model `theta_hat` stands for the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

PenaltyAlgorithm = Literal["auxiliary", "memory_efficient"]
"""Algorithm 1 of the paper, and Algorithm 2, which leaves the auxiliary model out."""


@dataclass(frozen=True)
class PenaltySchedule:
    """
    How strong the penalty gamma is at every update.

    Args:
        strength (`float`):
            Gamma in the first epoch, in [0, 1].
        increment (`float`, *optional*, defaults to `0.0`):
            Added at the start of every later epoch.
        maximum (`float`, *optional*, defaults to `1.0`):
            Never exceeded.
        ramp (`float`, *optional*, defaults to `0.0`):
            Share of the training over which the result rises linearly from 0.

    Example:

    ```python
    >>> schedule = PenaltySchedule(strength=0.0, increment=0.03)
    >>> [round(schedule.at(step, per_epoch=10, total=30), 2) for step in (0, 9, 10, 29)]
    [0.0, 0.0, 0.03, 0.06]
    ```
    """

    strength: float
    increment: float = 0.0
    maximum: float = 1.0
    ramp: float = 0.0

    @classmethod
    def of_reference_code(cls, upperlevel_weight: float, upperlevel_weight_decay: float) -> PenaltySchedule:
        """
        The schedule that the reference code's two settings stand for: `gamma = 1 - u0 + epoch * decay`.

        Args:
            upperlevel_weight (`float`):
                Weight `u0` of the safe set's loss in the first epoch.
            upperlevel_weight_decay (`float`):
                Taken off it at every later epoch.

        Returns:
            [`PenaltySchedule`].
        """
        return cls(strength=1 - upperlevel_weight, increment=upperlevel_weight_decay)

    def at(self, step: int, *, per_epoch: int, total: int) -> float:
        """
        Gamma of an update.

        Args:
            step (`int`):
                Updates made before it.
            per_epoch (`int`):
                Updates in an epoch.
            total (`int`):
                Updates of the whole training.

        Returns:
            `float` in [0, `maximum`].
        """
        gamma = min(max(self.strength + self.increment * (step // per_epoch), 0.0), self.maximum)
        warm = self.ramp * total
        return gamma * min(step / warm, 1.0) if warm else gamma


def model_loss(safe: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, gamma: float) -> torch.Tensor:
    """
    What `theta` minimises: `(1 - gamma) mean(safe) + gamma mean(weights * rows)`.

    Args:
        safe (`torch.Tensor` of shape `(B_safe,)`):
            Losses of a batch of the safe set.
        rows (`torch.Tensor` of shape `(B,)`):
            Losses of a batch of the data.
        weights (`torch.Tensor` of shape `(B,)`):
            Weights of these rows among all rows; not normalised over the batch, which would be biased and, with one
            row a batch, leave the selector without any effect.
        gamma (`float`):
            Penalty strength.

    Returns:
        `torch.Tensor`: a scalar.
    """
    return (1 - gamma) * safe.mean() + gamma * (weights * rows).mean()


def selection_signal(rows: torch.Tensor, auxiliary: torch.Tensor | None) -> torch.Tensor:
    """
    What speaks against every row: large where a model that must serve the safe set as well cannot fit it.

    Args:
        rows (`torch.Tensor` of shape `(B,)`):
            Losses under `theta`.
        auxiliary (`torch.Tensor` of shape `(B,)`, *optional*):
            Losses under `theta_hat` (Algorithm 1). Without them the loss itself is the signal (Algorithm 2), which
            ranks by loss and has no optimum inside the simplex.

    Returns:
        `torch.Tensor` of shape `(B,)`, float64, detached.
    """
    found = rows.detach().double()
    return found if auxiliary is None else found - auxiliary.detach().double()
