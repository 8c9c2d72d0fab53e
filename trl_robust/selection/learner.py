"""The selector while it is learned: its logits, their optimiser, and what is remembered of every row."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from .functions import SelectorFunction, initial_logits, row_weights

SelectorOptimizer = Literal["sgd", "exponentiated_gradient", "adam"]

ADAM_BETAS = (0.9, 0.95)
"""Of the reference code, as is its epsilon of 1e-8."""
EMA = 0.5
"""Share of the newest loss in a row's moving average."""


class SelectorLearner:
    """
    One logit a row, moved by `d/d logits mean(weights[rows] * signal)` of every update's rows (seal.md 4).

    The gradient is exact and dense: through the normalisation it reaches the rows outside the batch, too. Everything
    is float64 on the CPU, where even for a million rows an update takes milliseconds.

    Args:
        rows (`int`):
            N, the number of rows.
        function (`str`, *optional*, defaults to `"softmax"`):
            Selector function.
        normalized (`bool`, *optional*, defaults to `True`):
            Whether weights are divided by their mean.
        optimizer (`str`, *optional*, defaults to `"sgd"`):
            `"sgd"`; `"exponentiated_gradient"`: `logit -= learning_rate * signal` for the rows of the update, then
            centred (softmax only); `"adam"`: the reference code's, which ranks rows by when they were last seen.
        learning_rate (`float`, *optional*, defaults to `1.0`):
            Of the logits. 0 keeps all weights at 1.
        average_from (`int`, *optional*):
            First update from which on the logits are averaged; they are not if not given.

    Raises:
        `ValueError`: exponentiated gradient with another function than softmax.
    """

    def __init__(
        self,
        rows: int,
        *,
        function: SelectorFunction = "softmax",
        normalized: bool = True,
        optimizer: SelectorOptimizer = "sgd",
        learning_rate: float = 1.0,
        average_from: int | None = None,
    ) -> None:
        if optimizer == "exponentiated_gradient" and function != "softmax":
            raise ValueError(
                f"Exponentiated gradient multiplies the weights of a softmax, and the function is {function}. Use "
                "`selector_optimizer: sgd`, or `selector_function: softmax`."
            )
        self.function, self.normalized = function, normalized
        self.optimizer, self.learning_rate, self.average_from = optimizer, learning_rate, average_from
        self.logits = initial_logits(function, rows)
        self._sum, self._averaged = torch.zeros_like(self.logits), 0
        self._adam = (
            torch.optim.Adam([self.logits], lr=learning_rate, betas=ADAM_BETAS) if optimizer == "adam" else None
        )
        self._weights: torch.Tensor | None = None
        nothing = torch.full((rows,), float("nan"), dtype=torch.float64)
        self.visits = torch.zeros(rows, dtype=torch.int64)
        self.last_visit_step = torch.full((rows,), -1)
        self.first_loss, self.ema_loss, self.ema_loss_aux = nothing.clone(), nothing.clone(), nothing.clone()

    def weights(self) -> torch.Tensor:
        """
        Weights of all rows as they are now.

        Returns:
            `torch.Tensor` of shape `(N,)`, float64.
        """
        if self._weights is None:
            self._weights = row_weights(self.logits, self.function, self.normalized)
        return self._weights

    def gradient(self, rows: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
        """
        Gradient of `mean(weights[rows] * signal)` with respect to all logits.

        Args:
            rows (`torch.Tensor` of shape `(B,)`):
                Numbers of an update's rows.
            signal (`torch.Tensor` of shape `(B,)`):
                What speaks against each of them, as [`selection_signal`] has it.

        Returns:
            `torch.Tensor` of shape `(N,)`, float64.
        """
        logits = self.logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = (row_weights(logits, self.function, self.normalized)[rows] * signal.double()).mean()
            return torch.autograd.grad(loss, logits)[0]

    def step(self, rows: torch.Tensor, signal: torch.Tensor, update: int) -> None:
        """
        Moves the logits by one update.

        Args:
            rows (`torch.Tensor` of shape `(B,)`):
                Numbers of the rows of the whole update: of all its micro-batches and processes.
            signal (`torch.Tensor` of shape `(B,)`):
                What speaks against each.
            update (`int`):
                Number of the update, from 0.

        Raises:
            `FloatingPointError`: the signal is not finite.
        """
        if not bool(signal.isfinite().all()):
            raise FloatingPointError(
                f"The loss of a row is not finite in update {update} (rows {rows[~signal.isfinite()].tolist()[:5]}), "
                "so that it cannot be ranked. Lower `learning_rate`, or look at these rows."
            )
        self._move(rows, signal.double())
        self._weights = None
        if self.average_from is not None and update >= self.average_from:
            self._sum += self.logits
            self._averaged += 1

    def _move(self, rows: torch.Tensor, signal: torch.Tensor) -> None:
        if not self.learning_rate:
            return
        if self.optimizer == "exponentiated_gradient":
            self.logits.index_add_(0, rows, signal, alpha=-self.learning_rate)
            self.logits -= self.logits.mean()
            return
        gradient = self.gradient(rows, signal)
        if self._adam is not None:
            self.logits.grad = gradient
            self._adam.step()
            self.logits.grad = None
        else:
            self.logits -= self.learning_rate * gradient
        if self.function == "relu":
            self.logits.clamp_(min=0)

    def note(self, rows: torch.Tensor, losses: torch.Tensor, auxiliary: torch.Tensor | None, update: int) -> None:
        """
        Remembers that rows were seen, and with what losses.

        Args:
            rows (`torch.Tensor` of shape `(B,)`):
                Their numbers.
            losses (`torch.Tensor` of shape `(B,)`):
                Their losses under the model.
            auxiliary (`torch.Tensor` of shape `(B,)`, *optional*):
                Their losses under the auxiliary model.
            update (`int`):
                Number of the update, from 0.
        """
        self.visits.index_add_(0, rows, torch.ones_like(rows))
        self.last_visit_step[rows] = update
        self.first_loss[rows] = torch.where(self.first_loss[rows].isnan(), losses.double(), self.first_loss[rows])
        for kept, values in ((self.ema_loss, losses), (self.ema_loss_aux, auxiliary)):
            if values is not None:
                before = torch.where(kept[rows].isnan(), values.double(), kept[rows])
                kept[rows] = (1 - EMA) * before + EMA * values.double()

    @property
    def result(self) -> torch.Tensor:
        """Logits to rank by: the mean over the updates that were averaged, or the last. Shape `(N,)`, float64."""
        return self._sum / self._averaged if self._averaged else self.logits.clone()

    @property
    def statistics(self) -> dict[str, torch.Tensor]:
        """What is remembered of every row, by name, each of shape `(N,)`."""
        names = ("visits", "last_visit_step", "first_loss", "ema_loss", "ema_loss_aux")
        return {name: getattr(self, name).clone() for name in names}

    def save(self, path: Path) -> None:
        """
        Writes everything that a run which goes on needs.

        Args:
            path (`Path`):
                A safetensors file.
        """
        tensors = {"logits": self.logits, "sum": self._sum, "averaged": torch.tensor(self._averaged)}
        tensors |= self.statistics
        if self._adam is not None:
            state = self._adam.state[self.logits]
            tensors |= {f"adam/{name}": value for name, value in state.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def load(self, path: Path) -> None:
        """
        Reads what [`save`] wrote.

        Args:
            path (`Path`):
                The file.

        Raises:
            `ValueError`: it is of another number of rows.
        """
        tensors = load_file(path)
        if tensors["logits"].shape != self.logits.shape:
            raise ValueError(
                f"The checkpoint's selector has {len(tensors['logits'])} rows, and the training dataset has "
                f"{len(self.logits)}. Resume with the dataset that the run was started with."
            )
        self.logits.copy_(tensors["logits"])
        self._weights = None
        self._sum, self._averaged = tensors["sum"], int(tensors["averaged"])
        for name in self.statistics:
            setattr(self, name, tensors[name])
        state = {name.removeprefix("adam/"): value for name, value in tensors.items() if name.startswith("adam/")}
        if self._adam is not None and state:
            self._adam.state[self.logits] = state
