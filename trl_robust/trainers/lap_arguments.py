"""Settings of latent adversarial paraphrasing, beside those of TRL's configuration they extend."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ..inner.lagrangian_settings import (
    PRESETS,
    DeltaNorm,
    DeltaOptimizer,
    LagrangianSettings,
    Preset,
    Violation,
)
from ..threat.positions import SPANS, Positions
from ..threat.sites import parse_site, resolve_sites
from .checked_arguments import CheckedArguments
from .refusals import unsupported_settings

Branch = Literal["mix", "adv_only", "both", "sft_only"]
SearchFor = Literal["paraphrase", "random", "untargeted"]
Persist = Literal["none", "ema"]

KNOBS = tuple(item.name for item in fields(LagrangianSettings))
"""Settings of the search; each is a key with `lap_` in front, and the preset's own where it is not given."""


def branch_of_p(p: float) -> tuple[Branch, float]:
    """
    The paper's sampling coefficient p in our words (2503.01345, Algorithm 1 and its ablation).

    It is not monotone: 0 stands for "both, on every sample", and 1 for perturbed steps alone.

    Args:
        p (`float`):
            In [0, 1].

    Returns:
        `tuple`: `lap_branch` and `lap_adv_prob`.

    Raises:
        `ValueError`: p is outside [0, 1].

    Example:

    ```python
    >>> branch_of_p(0.3), branch_of_p(0), branch_of_p(1)
    (('mix', 0.3), ('both', 1.0), ('adv_only', 1.0))
    ```
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it is a probability, from 0 to 1.")
    if p in (0, 1):
        return ("both" if p == 0 else "adv_only"), 1.0
    return "mix", float(p)


@dataclass
class ParaphraseArguments(CheckedArguments):
    r"""
    The inner problem of latent adversarial paraphrasing, and which steps are made under its perturbations.

    Parameters:
        lap_layers (`list[str]`, *optional*, defaults to `["0.625"]`):
            Where the hidden states are perturbed: `embedding`, indices of decoder layers, or fractions of the depth.
            Several share one multiplier. (The paper counts the states, so that its layer l is our l - 1; it does not
            say which it used.)
        lap_epsilon (`float`, *optional*, defaults to `0.05`):
            How far the loss may move, in nats a token (in DPO: of the pair's loss).
        lap_steps (`int`, *optional*, defaults to `8`):
            Steps of the search. 0 turns the perturbations off.
        lap_preset (`str`, *optional*, defaults to `"robust"`):
            `"robust"`, or `"paper"` and `"paper_rms"`: the two readings of the paper's loop (lap.md 6).
        lap_branch (`str`, *optional*, defaults to `"mix"`):
            Which updates are made under perturbation: `"mix"`: each with a chance of `lap_adv_prob`, drawn for the
            whole update and alike in all processes; `"adv_only"`: all; `"both"`: every update, with the unperturbed
            loss added; `"sft_only"`: none, which is plain training bit for bit.
        lap_adv_prob (`float`, *optional*, defaults to `0.5`):
            Chance of a perturbed update in `"mix"`.
        lap_positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens are perturbed: `"prompt"`, `"all"`, or the text of `"last_user"` or `"all_user"` turns.
        lap_search (`str`, *optional*, defaults to `"paraphrase"`):
            `"paraphrase"`: LAP. The controls: `"random"`, a random direction with the norm at every token that the
            search came to; `"untargeted"`, vanilla LAT, which maximises the loss inside a ball of `lap_radius`.
        lap_radius (`float`, *optional*, defaults to `0.1`):
            Radius of the untargeted control, relative to the median norm of the hidden states.
        lap_lambda_persist (`str`, *optional*, defaults to `"none"`):
            `"none"`: the multiplier begins at `lap_lambda_init` for every batch, as in the paper. `"ema"`: where the
            batches before have left it (a moving average of its logarithm, weight 0.1), so that it can bind in few
            steps (ours).
        lap_match_compute (`bool`, *optional*, defaults to `False`):
            The control for cost: plain training with so many more updates that it costs as many forward passes as
            these settings would.
        lap_curves (`bool`, *optional*, defaults to `False`):
            Whether the search's curves go to `lap_curves.jsonl`, a line a batch.
        lap_max_nonfinite (`int`, *optional*, defaults to `10`):
            Searches in a row without one finite row after which training stops. Until then such a batch is trained on
            unperturbed, counted and logged.
        lap_optimizer, lap_learning_rate, lap_norm, lap_norm_weight, lap_lambda_init, lap_alpha, lap_violation, lap_augmented, lap_max_log_step, lap_lambda_min, lap_lambda_max, lap_clip, lap_damped, lap_backoff, lap_token_cap, lap_init_scale, lap_skip_first_update (*optional*):
            In place of the preset's: see [`~trl_robust.inner.LagrangianSettings`]. `lap_alpha: 0` fixes the
            multiplier.
    """  # noqa: E501

    lap_layers: list[str] = field(
        default_factory=lambda: ["0.625"],
        metadata={"help": "Where: embedding, layer indices, or fractions of the depth. Several share a multiplier."},
    )
    lap_epsilon: float = field(default=0.05, metadata={"help": "How far the loss may move, in nats a token."})
    lap_steps: int = field(default=8, metadata={"help": "Steps of the search. 0 turns the perturbations off."})
    lap_preset: Preset = field(
        default="robust",
        metadata={
            "help": "Settings of the search: ours, or a reading of the paper.",
            "choices": list(get_args(Preset)),
        },
    )
    lap_branch: Branch = field(
        default="mix",
        metadata={"help": "Which updates are made under perturbation.", "choices": list(get_args(Branch))},
    )
    lap_adv_prob: float = field(default=0.5, metadata={"help": "Chance of a perturbed update, with lap_branch: mix."})
    lap_positions: Positions = field(
        default="prompt", metadata={"help": "Which tokens are perturbed.", "choices": list(get_args(Positions))}
    )
    lap_search: SearchFor = field(
        default="paraphrase",
        metadata={
            "help": "The paraphrase, or a control: a random direction of equal norm, or untargeted LAT.",
            "choices": list(get_args(SearchFor)),
        },
    )
    lap_radius: float = field(
        default=0.1, metadata={"help": "Radius of the untargeted control, relative to the median hidden-state norm."}
    )
    lap_lambda_persist: Persist = field(
        default="none",
        metadata={
            "help": "Where the multiplier begins: anew, or at a moving average of where it ended.",
            "choices": list(get_args(Persist)),
        },
    )
    lap_match_compute: bool = field(
        default=False, metadata={"help": "Train without perturbations, with as many updates as cost the same."}
    )
    lap_curves: bool = field(default=False, metadata={"help": "Write the search's curves to lap_curves.jsonl."})
    lap_max_nonfinite: int = field(
        default=10, metadata={"help": "Searches in a row without one finite row after which training stops."}
    )
    lap_optimizer: DeltaOptimizer | None = field(
        default=None,
        metadata={"help": "Optimiser of the perturbation (preset).", "choices": list(get_args(DeltaOptimizer))},
    )
    lap_learning_rate: float | None = field(default=None, metadata={"help": "Its learning rate (preset)."})
    lap_norm: DeltaNorm | None = field(
        default=None, metadata={"help": "What is to be long (preset).", "choices": list(get_args(DeltaNorm))}
    )
    lap_norm_weight: float | None = field(default=None, metadata={"help": "Weight of the norm (preset)."})
    lap_lambda_init: float | None = field(default=None, metadata={"help": "Multiplier to begin with (preset)."})
    lap_alpha: float | None = field(
        default=None, metadata={"help": "Learning rate of log lambda (preset); 0 fixes the multiplier."}
    )
    lap_violation: Violation | None = field(
        default=None,
        metadata={"help": "What moves the multiplier (preset).", "choices": list(get_args(Violation))},
    )
    lap_augmented: float | None = field(default=None, metadata={"help": "Weight of the augmented term (preset)."})
    lap_max_log_step: float | None = field(default=None, metadata={"help": "Bound of a step of log lambda (preset)."})
    lap_lambda_min: float | None = field(default=None, metadata={"help": "Least multiplier (preset)."})
    lap_lambda_max: float | None = field(default=None, metadata={"help": "Largest multiplier (preset)."})
    lap_clip: bool | None = field(default=None, metadata={"help": "Clip the gradient to that of the norm (preset)."})
    lap_damped: bool | None = field(
        default=None, metadata={"help": "Keep steps along the loss gradient from overshooting (preset)."}
    )
    lap_backoff: bool | None = field(
        default=None, metadata={"help": "Shorten what violates the constraint at the end (preset)."}
    )
    lap_token_cap: float | None = field(
        default=None, metadata={"help": "Bound at every token, as a multiple of its hidden state's norm (preset)."}
    )
    lap_init_scale: float | None = field(default=None, metadata={"help": "Size of the random start (preset)."})
    lap_skip_first_update: bool | None = field(
        default=None, metadata={"help": "Leave the multiplier alone after the first step (preset)."}
    )

    _lists = ("lap_layers",)

    @property
    def branch(self) -> Branch:
        """The branch that is trained on."""
        return "sft_only" if self.lap_match_compute else self.lap_branch

    @property
    def attacks(self) -> bool:
        """Whether these settings perturb anything at all."""
        chance = self.lap_adv_prob > 0 or self.branch != "mix"
        return self.branch != "sft_only" and self.lap_steps > 0 and chance

    @property
    def positions(self) -> Positions:
        """Which tokens are perturbed."""
        return self.lap_positions

    @property
    def needs_prompt(self) -> bool:
        """Whether the search needs prompts."""
        return self.attacks and self.lap_positions in ("prompt", *SPANS)

    @property
    def site_keys(self) -> dict[str, list[str]]:
        """Keys that name sites, and what they name."""
        return {"lap_layers": self.lap_layers}

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the search that are given in place of the preset's."""
        given = {name: getattr(self, f"lap_{name}") for name in KNOBS}
        return {name: value for name, value in given.items() if value is not None}

    def cost_ratio(self, num_layers: int, reference: int = 0) -> float:
        """
        Cost of training with these settings over that of plain training, in forward passes (lap.md 5).

        An update under perturbation costs `1 + (2 * steps - 1) * s + 3`: the clean pass, the search through the share
        `s` of the layers above the lowest perturbed one, and the training pass. Backing off, at most six passes
        through these layers more, is not counted.

        Args:
            num_layers (`int`):
                Decoder layers of the model.
            reference (`int`, *optional*, defaults to `0`):
                Passes of a reference model in every update.

        Returns:
            `float`.
        """
        lowest = resolve_sites([parse_site(site) for site in self.lap_layers], num_layers)[0]
        share = 1.0 if lowest == "embedding" else 1 - (int(lowest) + 1) / num_layers
        plain = 3 + reference
        perturbed = 1 + (2 * self.lap_steps - 1) * share + plain
        chance = self.lap_adv_prob if self.lap_branch == "mix" else 1.0
        if self.lap_branch == "sft_only" or not self.lap_steps:
            return 1.0
        if self.lap_branch == "both":
            return (perturbed + 3) / plain
        return (chance * perturbed + (1 - chance) * plain) / plain

    def faults(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each, in the words of a recipe."""
        problems = []
        for name, item in type(self).__dataclass_fields__.items():  # type: ignore[attr-defined]
            choices, value = item.metadata.get("choices"), getattr(self, name)
            if name.startswith("lap_") and choices and value is not None and value not in choices:
                problems.append(f"`{name}` is {value!r}; choose one of {choices}.")
        if not problems:
            bare = object.__new__(LagrangianSettings)
            for name, value in {**asdict(PRESETS[self.lap_preset]), **self.overrides}.items():
                object.__setattr__(bare, name, value)
            names = "|".join(KNOBS)
            problems += [re.sub(rf"`(?=({names})`)", "`lap_", problem) for problem in bare.faults()]
        if not self.lap_layers:
            problems.append("`lap_layers` is empty; name at least one, such as 0.625.")
        for site in self.lap_layers:
            try:
                parse_site(site)
            except ValueError as error:
                problems.append(f"lap_layers: {error}")
        if not 0 < self.lap_epsilon < math.inf:
            problems.append(f"`lap_epsilon` is {self.lap_epsilon}; it must be a finite number above 0.")
        if self.lap_steps < 0:
            problems.append(f"`lap_steps` is {self.lap_steps}; it must be at least 0.")
        if not 0 <= self.lap_adv_prob <= 1:
            problems.append(f"`lap_adv_prob` is {self.lap_adv_prob}; it must be from 0 to 1.")
        if not 0 <= self.lap_radius < math.inf:
            problems.append(f"`lap_radius` is {self.lap_radius}; it must be a finite number of at least 0.")
        if self.lap_max_nonfinite < 1:
            problems.append(f"`lap_max_nonfinite` is {self.lap_max_nonfinite}; it must be at least 1.")
        return problems + unsupported_settings(self)
