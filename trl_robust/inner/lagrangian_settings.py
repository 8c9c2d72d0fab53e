"""Settings of LAP's inner problem, and the presets that stand for the readings of the paper."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

DeltaOptimizer = Literal["sgd", "adamw", "normalized"]
DeltaNorm = Literal["l2", "rms", "l2_token_mean"]
Violation = Literal["abs", "signed"]
Preset = Literal["robust", "paper", "paper_rms"]


@dataclass(frozen=True)
class LagrangianSettings:
    """
    How the constrained search is made. The defaults are the preset `robust`.

    Args:
        optimizer (`str`, *optional*, defaults to `"normalized"`):
            `"sgd"`: Eq. 7 as it stands. `"adamw"`: without weight decay. `"normalized"`: gradient descent in which
            lengths are counted in units of the row's own hidden states (their L2 norm over the perturbed tokens), so
            that one learning rate serves all models and layers.
        learning_rate (`float`, *optional*, defaults to `0.05`):
            Of the perturbation. With `"normalized"`, a step's length as a share of the hidden states' norm.
        norm (`str`, *optional*, defaults to `"l2"`):
            What is to be long: `"l2"` over all perturbed tokens, `"rms"` over their coordinates, or `"l2_token_mean"`.
        norm_weight (`float`, *optional*, defaults to `1.0`):
            Weight `c` of the norm in the Lagrangian. 0.1 fits the paper's curves, which does not state it.
        lambda_init (`float`, *optional*, defaults to `0.1`):
            The multiplier to begin with.
        alpha (`float`, *optional*, defaults to `2.0`):
            Learning rate of its logarithm (Eq. 8). 0 keeps it as it is.
        violation (`str`, *optional*, defaults to `"abs"`):
            What moves the multiplier: `"abs"`, `|J - J0| - epsilon` as in Eq. 3 and 6, or `"signed"`,
            `J - J0 - epsilon` as in Eq. 8, which does not see a loss that falls too far.
        augmented (`float`, *optional*, defaults to `5.0`):
            Weight of the augmented term, `0.5 * augmented * max(violation, 0) ** 2`.
        max_log_step (`float`, *optional*, defaults to `0.25`):
            Bound of one step of log lambda.
        lambda_min, lambda_max (`float`, *optional*, default to `1e-6` and `1e4`):
            Bounds of lambda.
        clip (`bool`, *optional*, defaults to `True`):
            Whether a row's gradient is clipped to the length of the norm's own gradient.
        damped (`bool`, *optional*, defaults to `True`):
            Whether the loss term's part of a step is kept so short that, to first order, it takes the loss no further
            than epsilon beyond where it was without a perturbation. Without it, a step along a steep loss overshoots
            (ours; `"adamw"` has no such steps).
        backoff (`bool`, *optional*, defaults to `True`):
            Whether a row that violates the constraint at the end is shortened until it does not, and the longest
            feasible perturbation of the search is returned.
        token_cap (`float`, *optional*, defaults to `1.0`):
            Bound of the L2 norm at every token, as a multiple of the norm of its hidden state.
        init_scale (`float`, *optional*, defaults to `1e-3`):
            Standard deviation of the start, as a multiple of the RMS of the hidden states. The search cannot leave 0.
        skip_first_update (`bool`, *optional*, defaults to `False`):
            Whether the multiplier stays as it is after the first step, as the paper's curves show.

    Raises:
        `ValueError`: naming every field that is wrong.
    """

    optimizer: DeltaOptimizer = "normalized"
    learning_rate: float = 0.05
    norm: DeltaNorm = "l2"
    norm_weight: float = 1.0
    lambda_init: float = 0.1
    alpha: float = 2.0
    violation: Violation = "abs"
    augmented: float = 5.0
    max_log_step: float = 0.25
    lambda_min: float = 1e-6
    lambda_max: float = 1e4
    clip: bool = True
    damped: bool = True
    backoff: bool = True
    token_cap: float = 1.0
    init_scale: float = 1e-3
    skip_first_update: bool = False

    def __post_init__(self) -> None:
        if problems := self.faults():
            raise ValueError(" ".join(problems))

    def faults(self) -> list[str]:
        """Everything that is wrong with the fields, one sentence each; empty if nothing is."""
        problems = []
        for name, choices in (("optimizer", DeltaOptimizer), ("norm", DeltaNorm), ("violation", Violation)):
            if getattr(self, name) not in get_args(choices):
                problems.append(f"`{name}` is {getattr(self, name)!r}; choose one of {list(get_args(choices))}.")
        for name in ("learning_rate", "norm_weight", "init_scale", "max_log_step", "lambda_max", "token_cap"):
            if not getattr(self, name) > 0:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be above 0.")
        for name in ("lambda_init", "alpha", "augmented", "lambda_min"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be a finite number of at least 0.")
        if self.lambda_min > self.lambda_max:
            problems.append(f"`lambda_min` is {self.lambda_min}, above `lambda_max` {self.lambda_max}.")
        return problems


PAPER = LagrangianSettings(
    optimizer="sgd",
    learning_rate=0.5,
    norm_weight=0.1,
    violation="signed",
    augmented=0.0,
    max_log_step=math.inf,
    lambda_min=0.0,
    lambda_max=math.inf,
    clip=False,
    damped=False,
    backoff=False,
    token_cap=math.inf,
    # The paper's curve of the norm begins at 0.000: under this reading, with steps of 0.05, the start must be shorter.
    init_scale=1e-6,
    skip_first_update=True,
)

PRESETS: dict[Preset, LagrangianSettings] = {
    "robust": LagrangianSettings(),
    # The two readings of the paper's Figure 5 (lap.md 6): plain gradient on the L2 norm, AdamW on the RMS.
    "paper": PAPER,
    "paper_rms": replace(PAPER, optimizer="adamw", learning_rate=0.05, norm="rms", init_scale=1e-3),
}


def preset_settings(preset: str, overrides: Mapping[str, Any]) -> LagrangianSettings:
    """
    A preset, with some of its settings replaced.

    Args:
        preset (`str`):
            `"robust"`, `"paper"` or `"paper_rms"`.
        overrides (`Mapping`):
            Fields of [`LagrangianSettings`] and their values.

    Returns:
        [`LagrangianSettings`].

    Raises:
        `ValueError`: an unknown preset or field, or a value that cannot be.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` is {preset!r}; choose one of {list(PRESETS)}.")
    names = [item.name for item in fields(LagrangianSettings)]
    for name in overrides:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"`{name}` is no setting of the search" + (f"; did you mean `{near[0]}`?" if near else ".")
            )
    return LagrangianSettings(**{**asdict(PRESETS[preset]), **overrides})
