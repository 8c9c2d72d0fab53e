"""The threat model: where an adversary may act, on which tokens, and how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

from torch import nn

from .balls import Ball, Norm
from .positions import Positions
from .sites import Site, Stream, decoder_layers, parse_site, resolve_sites

RadiusUnit = Literal["absolute", "relative"]


@dataclass(frozen=True)
class ThreatModel:
    """
    What an adversary may do to a model's hidden states: sites x positions x ball.

    Every site has a perturbation and a ball of its own. The same object serves training and testing.

    Args:
        sites (sequence of `str`, `int` or `float`):
            Where: `"embedding"` (the residual stream that enters layer 0), indices of decoder layers (negative ones
            count from the end), or fractions of the depth (floats in `[0, 1]`).
        stream (`str`, *optional*, defaults to `"layer"`):
            What is perturbed at a layer: `"layer"`, the residual stream that leaves it, or `"mlp"`, the output of its
            MLP. Equal on architectures that add the MLP's output to the stream last (Llama, Mistral, Qwen2/3, Phi-3,
            GPT-NeoX); different on Gemma 2 and 3, which normalise it first.
        positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens: `"prompt"`, `"completion"`, `"all"`, `"last_user"` or `"all_user"`.
        norm (`str`, *optional*, defaults to `"l2"`):
            `"l1"`, `"l2"` or `"linf"`.
        radius (`float` or `Mapping`, *optional*, defaults to `1.0`):
            How far. A mapping gives every site a radius of its own.
        radius_unit (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`, or `"relative"`: a multiple of the median L2 norm of the unperturbed hidden states at the
            site, over the tokens that may be perturbed.
        ball (`str`, *optional*, defaults to `"token"`):
            `"token"`: a ball for every token. `"sequence"`: one for all selected tokens of a row.

    Raises:
        `ValueError`: naming every field that is wrong.

    Example:

    ```python
    >>> from trl_robust import ThreatModel
    >>> ThreatModel(["embedding", 0.5], radius=0.1, radius_unit="relative").resolve_sites(32)
    ('embedding', 16)
    ```
    """

    sites: Sequence[str | int | float]
    stream: Stream = "layer"
    positions: Positions = "prompt"
    norm: Norm = "l2"
    radius: float | Mapping[Site, float] = 1.0
    radius_unit: RadiusUnit = "absolute"
    ball: Ball = "token"

    def __post_init__(self) -> None:
        if isinstance(self.sites, str | int | float):
            object.__setattr__(self, "sites", (self.sites,))
        if problems := self.faults():
            raise ValueError(" ".join(problems))
        object.__setattr__(self, "sites", tuple(parse_site(site) for site in self.sites))

    def faults(self) -> list[str]:
        """
        Everything that is wrong with the fields, one sentence each; empty if nothing is.

        Returns:
            `list[str]`.
        """
        problems = []
        for name, choices in (
            ("stream", Stream),
            ("positions", Positions),
            ("norm", Norm),
            ("radius_unit", RadiusUnit),
            ("ball", Ball),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                problems.append(f"`{name}` is {value!r}; choose one of {list(get_args(choices))}.")
        if not self.sites:
            problems.append("`sites` is empty; name at least one, such as `embedding` or a layer.")
        for site in self.sites or ():
            try:
                parse_site(site)
            except ValueError as error:
                problems.append(str(error))
        radii = self.radius.values() if isinstance(self.radius, Mapping) else [self.radius]
        for radius in radii:
            if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 <= radius < float("inf"):
                problems.append(f"`radius` is {radius!r}; it must be a finite number of at least 0.")
        return problems

    def resolve_sites(self, model: nn.Module | int) -> tuple[Site, ...]:
        """
        The sites in a given model.

        Args:
            model (`nn.Module` or `int`):
                The model, or its number of decoder layers.

        Returns:
            `tuple`: `"embedding"` and layer indices, in the order in which they run.

        Raises:
            `ValueError`: a site that the model does not have.
        """
        return resolve_sites(self.sites, model if isinstance(model, int) else len(decoder_layers(model)))

    def radius_at(self, site: Site) -> float:
        """
        The radius at a resolved site, in `radius_unit`.

        Args:
            site (`"embedding"` or `int`):
                A resolved site.

        Returns:
            `float`.

        Raises:
            `KeyError`: the radii are a mapping that lacks the site.
        """
        return float(self.radius[site] if isinstance(self.radius, Mapping) else self.radius)

    @property
    def is_zero(self) -> bool:
        """Whether no perturbation but zero is allowed anywhere."""
        radii = self.radius.values() if isinstance(self.radius, Mapping) else [self.radius]
        return all(radius == 0 for radius in radii)

    def calibrated(self, norms: Mapping[Site, float]) -> ThreatModel:
        """
        The same threat with its relative radii turned into absolute ones.

        Args:
            norms (`Mapping[Site, float]`):
                Median L2 norm of the hidden states at every resolved site, as
                [`~trl_robust.inner.median_norms`] measures it.

        Returns:
            [`ThreatModel`] with `radius_unit="absolute"`; itself if it is absolute already.
        """
        if self.radius_unit == "absolute":
            return self
        radii = {site: self.radius_at(site) * norm for site, norm in norms.items()}
        return replace(self, sites=tuple(norms), radius=radii, radius_unit="absolute")
