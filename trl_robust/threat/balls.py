"""Norm balls: projections, steepest directions, random points.

A perturbation is a tensor of shape `(B, T, H)`. It is cut into vectors, one ball each: with `ball="token"` every
token is a vector of `H` numbers; with `ball="sequence"` every row is one vector made of its selected tokens. All
arithmetic is done in float32 (float64 if that is what comes in), whatever the model computes in.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Norm = Literal["l1", "l2", "linf"]
Ball = Literal["token", "sequence"]

BOUNDARY_TOLERANCE = 1e-3
"""A vector counts as lying on the boundary from `(1 - BOUNDARY_TOLERANCE) * radius` outwards."""


def _check(norm: str, radius: float, ball: str) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"`norm` is {norm!r}; choose one of {list(get_args(Norm))}.")
    if ball not in get_args(Ball):
        raise ValueError(f"`ball` is {ball!r}; choose one of {list(get_args(Ball))}.")
    if not radius >= 0:
        raise ValueError(f"`radius` is {radius}; it must be a number of at least 0.")


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _vectors(delta: torch.Tensor, ball: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Cuts `(B, T, H)` into the ball's vectors, unselected tokens as zeros: `(B, T, H)` or `(B, 1, T * H)`."""
    vectors = _exact(delta)
    if mask is not None:
        vectors = vectors * mask.unsqueeze(-1)
    return vectors.flatten(-2).unsqueeze(-2) if ball == "sequence" else vectors


def vector_norms(
    delta: torch.Tensor, norm: Norm, *, ball: Ball = "token", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Norm of every vector of a perturbation.

    Args:
        delta (`torch.Tensor` of shape `(B, T, H)`):
            Perturbation.
        norm (`str`):
            `"l1"`, `"l2"` or `"linf"`.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Selected tokens. The others count as zero.

    Returns:
        `torch.Tensor` of shape `(B, T)`, or `(B, 1)` with `ball="sequence"`.
    """
    _check(norm, 0.0, ball)
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[norm]
    return torch.linalg.vector_norm(_vectors(delta, ball, mask), ord=order, dim=-1)


def project(
    delta: torch.Tensor, norm: Norm, radius: float, *, ball: Ball = "token", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Nearest point (in Euclidean distance) of a norm ball.

    Args:
        delta (`torch.Tensor` of shape `(B, T, H)`):
            Perturbation, of any floating dtype. Computed in float32 inside.
        norm (`str`):
            `"l1"`, `"l2"` or `"linf"`.
        radius (`float`):
            Radius of the ball, at least 0, in the unit of `delta`.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"`: every token has a ball of its own. `"sequence"`: the selected tokens of a row share one.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Selected tokens. The others are returned as they came and take no part in the norm of a sequence.

    Returns:
        `torch.Tensor` of shape `(B, T, H)` and of `delta`'s dtype: a new tensor.

    Raises:
        `ValueError`: unknown `norm` or `ball`, or a radius that is negative or not a number.

    Example:

    ```python
    >>> from trl_robust.threat import project
    >>> project(torch.tensor([[[3.0, 4.0]]]), "l2", 1.0)
    tensor([[[0.6000, 0.8000]]])
    ```
    """
    _check(norm, radius, ball)
    vectors = _vectors(delta, ball, mask)
    if norm == "l2":
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        # Only vectors outside are touched, so that a point inside comes back bit for bit.
        projected = torch.where(lengths > radius, vectors * (radius / lengths.clamp(min=1e-45)), vectors)
    elif norm == "linf":
        projected = vectors.clamp(-radius, radius)
    else:
        projected = _project_l1(vectors, radius)
    if ball == "sequence":
        projected = projected.squeeze(-2).unflatten(-1, delta.shape[-2:])
    if mask is not None:
        projected = torch.where(mask.bool().unsqueeze(-1), projected, _exact(delta))
    return projected.to(delta.dtype, copy=True)


def _project_l1(vectors: torch.Tensor, radius: float) -> torch.Tensor:
    """Soft-thresholding at the level that makes the 1-norm equal to `radius`, found by sorting (lat.md 2.4)."""
    magnitudes = vectors.abs()
    descending = magnitudes.sort(dim=-1, descending=True).values
    counts = torch.arange(1, vectors.shape[-1] + 1, device=vectors.device, dtype=vectors.dtype)
    thresholds = (descending.cumsum(-1) - radius) / counts
    # The condition holds on a prefix of the sorted coordinates; its length is the size of the support.
    support = (descending > thresholds).sum(-1, keepdim=True).clamp(min=1)
    level = thresholds.gather(-1, support - 1)
    shrunk = vectors.sign() * (magnitudes - level).clamp(min=0)
    return torch.where(magnitudes.sum(-1, keepdim=True) <= radius, vectors, shrunk)


def steepest(
    gradient: torch.Tensor,
    norm: Norm,
    *,
    ball: Ball = "token",
    mask: torch.Tensor | None = None,
    l1_fraction: float = 0.01,
) -> torch.Tensor:
    """
    Direction of norm 1 along which a function with this gradient grows fastest.

    For `"l1"` the exact answer is a single coordinate, which is too sparse to search with; the step is spread evenly
    over the `l1_fraction` of coordinates with the largest gradient instead (at least one).

    Args:
        gradient (`torch.Tensor` of shape `(B, T, H)`):
            Gradient.
        norm (`str`):
            `"l1"`, `"l2"` or `"linf"`.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Selected tokens. The others get zero.
        l1_fraction (`float`, *optional*, defaults to `0.01`):
            Share of coordinates moved by an l1 step.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`, float32. Where the gradient is zero, so is the direction.
    """
    _check(norm, 0.0, ball)
    vectors = _vectors(gradient, ball, mask)
    if norm == "l2":
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        direction = torch.where(lengths > 0, vectors / lengths.clamp(min=1e-45), 0.0)
    elif norm == "linf":
        direction = vectors.sign()
    else:
        count = max(1, round(l1_fraction * vectors.shape[-1]))
        top = vectors.abs().topk(count, dim=-1).indices
        chosen = torch.zeros_like(vectors).scatter(-1, top, 1.0)
        direction = chosen * vectors.sign() / count
    return direction.squeeze(-2).unflatten(-1, gradient.shape[-2:]) if ball == "sequence" else direction


def random_point(
    shape: tuple[int, int, int],
    norm: Norm,
    radius: float,
    *,
    ball: Ball = "token",
    mask: torch.Tensor | None = None,
    on_boundary: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Random perturbation in a norm ball.

    Args:
        shape (`tuple[int, int, int]`):
            `(B, T, H)`.
        norm (`str`):
            `"l1"`, `"l2"` or `"linf"`.
        radius (`float`):
            Radius of the ball.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Selected tokens. The others get zero.
        on_boundary (`bool`, *optional*, defaults to `False`):
            Draw from the boundary instead of uniformly from the inside. On the boundary of `"linf"` every coordinate
            is at `+radius` or `-radius`, as it is at the end of an attack.
        generator (`torch.Generator`, *optional*):
            Source of randomness (on the CPU, so that every device draws the same point).
        device (`torch.device` or `str`, *optional*):
            Where the result goes.

    Returns:
        `torch.Tensor` of shape `(B, T, H)`, float32.
    """
    _check(norm, radius, ball)
    batch, tokens, hidden = shape
    rows = (batch, tokens, hidden)
    every = torch.ones(batch, tokens) if mask is None else mask.detach().to("cpu", torch.float32)
    selected = every.unsqueeze(-1)
    # Dimension of every vector: what a sequence leaves unselected does not count.
    dimension = selected.sum(1, keepdim=True) * hidden if ball == "sequence" else torch.tensor(float(hidden))
    along = (-2, -1) if ball == "sequence" else (-1,)

    if norm == "linf":
        uniform = torch.rand(rows, generator=generator) * 2 - 1
        point = torch.where(uniform < 0, -1.0, 1.0) if on_boundary else uniform
        return (point * selected * radius).to(device)
    if norm == "l2":
        draw = torch.randn(rows, generator=generator) * selected
        length = draw.square().sum(along, keepdim=True).sqrt()
    else:
        magnitude = -torch.log1p(-torch.rand(rows, generator=generator))
        sign = torch.where(torch.rand(rows, generator=generator) < 0.5, -1.0, 1.0)
        draw = magnitude * sign * selected
        length = draw.abs().sum(along, keepdim=True)
    point = draw / length.clamp(min=1e-30)
    if not on_boundary:
        depth = torch.rand(length.shape, generator=generator)
        point = point * depth ** (1 / dimension.clamp(min=1))
    return (point * radius).to(device)


def boundary_fraction(
    delta: torch.Tensor, norm: Norm, radius: float, *, ball: Ball = "token", mask: torch.Tensor | None = None
) -> float:
    """
    Share of the vectors that lie on the boundary of their ball (within `BOUNDARY_TOLERANCE`, relative).

    A share near 0 after an attack means that the radius does not bind: the attack stopped for want of steps or of
    step size, and any larger radius would have given the same result.

    Args:
        delta (`torch.Tensor` of shape `(B, T, H)`):
            Perturbation.
        norm (`str`):
            `"l1"`, `"l2"` or `"linf"`.
        radius (`float`):
            Radius of the ball.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"` or `"sequence"`.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Selected tokens; only vectors with a selected token are counted.

    Returns:
        `float` in `[0, 1]`; 0 where no token is selected.
    """
    _check(norm, radius, ball)
    lengths = vector_norms(delta, norm, ball=ball, mask=mask)
    on_it = (lengths >= (1 - BOUNDARY_TOLERANCE) * radius).float()
    if mask is None:
        return on_it.mean().item()
    counted = mask.any(-1, keepdim=True) if ball == "sequence" else mask
    return ((on_it * counted).sum() / counted.sum().clamp(min=1)).item()
