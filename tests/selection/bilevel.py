"""Bilevel problems small enough to be solved by hand, in float64 (seal.md 8)."""

from __future__ import annotations

import torch

from trl_robust.selection import SelectorLearner, selection_signal

DOUBLE = torch.float64


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


class Scalar:
    """`l_i = (theta - a_i)^2 / 2`, `F = theta^2 / 2`: the weighted optimum is the weighted mean of a."""

    a = numbers(-1, 1, 3)

    def losses(self, theta: float | torch.Tensor) -> torch.Tensor:
        return (theta - self.a).square() / 2

    def optimum(self, weights: torch.Tensor) -> torch.Tensor:
        return (weights * self.a).mean()

    def penalised(self, weights: torch.Tensor, gamma: float) -> torch.Tensor:
        return gamma * self.optimum(weights)

    def upper(self, theta: torch.Tensor) -> torch.Tensor:
        return theta.square() / 2


class Ridge:
    """Six weighted rows on a line, the last two negated, and four clean ones to serve."""

    decay = 0.1
    t = numbers(-2, -1, 0, 1, 2, 3)
    x = torch.stack([torch.ones_like(t), t], dim=1)
    y = torch.cat([(1 + 2 * t)[:4], -(1 + 2 * t)[4:]])
    safe_t = numbers(-1.5, -0.5, 0.5, 1.5)
    safe_x = torch.stack([torch.ones_like(safe_t), safe_t], dim=1)
    safe_y = 1 + 2 * safe_t

    def losses(self, theta: torch.Tensor) -> torch.Tensor:
        return (self.x @ theta - self.y).square() / 2

    def upper(self, theta: torch.Tensor) -> torch.Tensor:
        return ((self.safe_x @ theta - self.safe_y).square() / 2).mean()

    def _system(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weighted = self.x.T * weights / len(weights)
        return weighted @ self.x + self.decay * torch.eye(2, dtype=DOUBLE), weighted @ self.y

    def optimum(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(*self._system(weights))

    def penalised(self, weights: torch.Tensor, gamma: float) -> torch.Tensor:
        matrix, right = self._system(weights)
        count = len(self.safe_y)
        safe_matrix, safe_right = self.safe_x.T @ self.safe_x / count, self.safe_x.T @ self.safe_y / count
        return torch.linalg.solve((1 - gamma) * safe_matrix + gamma * matrix, (1 - gamma) * safe_right + gamma * right)

    def hypergradient(self, weights: torch.Tensor) -> torch.Tensor:
        """`dF(theta*(w)) / dw`, by the implicit function theorem."""
        theta = self.optimum(weights)
        matrix, _ = self._system(weights)
        slope = self.safe_x.T @ (self.safe_x @ theta - self.safe_y) / len(self.safe_y)
        return -(self.x @ theta - self.y) * (self.x @ torch.linalg.solve(matrix, slope)) / len(weights)


def descend(
    toy: Scalar | Ridge, gamma: float, steps: int, *, auxiliary: bool, learning_rate: float, optimizer: str = "sgd"
) -> SelectorLearner:
    """Full-batch descent of the selector, with both models solved exactly at every step."""
    rows = torch.arange(len(toy.losses(toy.optimum(torch.ones(1, dtype=DOUBLE)))))
    learner = SelectorLearner(len(rows), optimizer=optimizer, learning_rate=learning_rate)  # type: ignore[arg-type]
    for step in range(steps):
        weights = learner.weights()
        second = toy.losses(toy.optimum(weights)) if auxiliary else None
        learner.step(rows, selection_signal(toy.losses(toy.penalised(weights, gamma)), second), step)
    return learner


def auroc(scores: torch.Tensor, bad: torch.Tensor) -> float:
    """Chance that a good row outranks a bad one, ties counting half."""
    good, wrong = scores[~bad].sort().values, scores[bad]
    below = torch.searchsorted(good, wrong, right=False), torch.searchsorted(good, wrong, right=True)
    greater = len(good) - below[1].double() + (below[1] - below[0]).double() / 2
    return (greater.mean() / len(good)).item()
