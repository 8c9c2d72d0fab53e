"""From a row's logit to its weight (seal.md 4): four functions, all with a mean weight of 1 at the start.

Weights have mean 1 (the paper's softmax sums to 1 and its G is divided by N as well, which would make every weight 1/N
of what the penalty is meant to weigh).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

SelectorFunction = Literal["softmax", "sigmoid", "relu", "tanh"]

STARTS: dict[str, float] = {"softmax": 0.0, "sigmoid": 0.0, "relu": 1.0, "tanh": 0.0}
"""Logit of every row before the first step. (The reference code begins softmax at 0.1, which is the same weights.)"""


def check_function(function: str) -> None:
    """
    Refuses what is no selector function.

    Args:
        function (`str`):
            Name.

    Raises:
        `ValueError`: it is not one of the four, or is the raw tanh.
    """
    if function in get_args(SelectorFunction):
        return
    if function.replace("-", "_") in ("raw_tanh", "tanh_raw"):
        raise ValueError(
            f"`selector_function` is {function}: tanh itself gives negative weights, and a row with a negative weight "
            "is trained on by gradient ascent, so that the objective has no lower bound. Use `tanh`, which is "
            "1 + tanh."
        )
    raise ValueError(f"`selector_function` is {function!r}; it is one of {list(get_args(SelectorFunction))}.")


def initial_logits(function: SelectorFunction, rows: int) -> torch.Tensor:
    """
    Logits under which every row weighs 1.

    Args:
        function (`str`):
            Selector function.
        rows (`int`):
            Number of rows.

    Returns:
        `torch.Tensor` of shape `(rows,)`, float64.
    """
    check_function(function)
    return torch.full((rows,), STARTS[function], dtype=torch.float64)


def row_weights(logits: torch.Tensor, function: SelectorFunction, normalized: bool = True) -> torch.Tensor:
    """
    Weights of all rows; differentiable, never negative.

    `softmax`: `N softmax(logits)`. `sigmoid`: `2 / (1 + exp(-logits))`. `tanh`: `1 + tanh(logits)`, which is the
    sigmoid of twice the logits. `relu`: `max(0, logits)`, whose slope at 0 is taken to be 1, so that a row that has
    been shut out can come back.

    Args:
        logits (`torch.Tensor` of shape `(N,)`):
            One number a row.
        function (`str`):
            Selector function.
        normalized (`bool`, *optional*, defaults to `True`):
            Whether weights are divided by their mean. Without it the weights of all rows can shrink together, which
            makes any penalty small; softmax is normalised either way.

    Returns:
        `torch.Tensor` of shape `(N,)`: mean 1 if normalised.

    Raises:
        `ValueError`: an unknown function.
        `FloatingPointError`: every weight is 0, so that there is no mean to divide by.
    """
    check_function(function)
    if function == "softmax":
        return len(logits) * logits.softmax(0)
    if function == "sigmoid":
        weights = 2 * logits.sigmoid()
    elif function == "tanh":
        weights = 1 + logits.tanh()
    else:
        weights = logits.clamp(min=0)  # torch takes the slope of `clamp` at its bound to be 1, that of `relu` to be 0
    if not normalized:
        return weights
    mean = weights.mean()
    if not (math.isfinite(mean.item()) and mean > 0):
        raise FloatingPointError(
            "The selector has shut out every row, or its logits are not finite. Lower `selector_learning_rate`."
        )
    return weights / mean
