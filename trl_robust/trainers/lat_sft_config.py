from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from trl import SFTConfig

from ..inner.pgd import Init, Objective, Optimizer
from ..threat import ThreatModel
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.positions import Positions
from ..threat.sites import Stream
from .refusals import MLP_AND_CHECKPOINTING, unsupported_settings


@dataclass
class LATSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`LATSFTTrainer`].

    Only the parameters of latent adversarial training stand here; all others are those of [`~trl.SFTConfig`].

    Parameters:
        > Parameters that control the attack (the inner problem, 2407.15549 Eq. 3)

        attack_sites (`list[str]`, *optional*, defaults to `["0.25", "0.5", "0.75", "0.94"]`):
            Where the hidden states are perturbed: `embedding`, indices of decoder layers (`8`, `-1`), or fractions of
            the depth (`0.5`). The default is the published choice, layers 8, 16, 24 and 30 of 32.
        attack_stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"`: the residual stream after the layer. `"mlp"`: the output of its MLP, as the reference code.
        attack_positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens are perturbed: `"prompt"`, `"completion"`, `"all"` or `"last_user"` (conversational data).
        attack_norm (`str`, *optional*, defaults to `"l2"`):
            Norm of the ball: `"l1"`, `"l2"` or `"linf"`.
        attack_radius (`float`, *optional*, defaults to `1.0`):
            Radius of the ball at every site. 0 turns the attack off.
        attack_radius_unit (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`, or `"relative"`: a multiple of the median norm of the hidden states at the site, measured
            once, before the first step, on 64 rows of the training data, and kept with the checkpoints.
        attack_ball (`str`, *optional*, defaults to `"token"`):
            `"token"`: a ball for every token. `"sequence"`: one for a row (2403.05030).
        attack_steps (`int`, *optional*, defaults to `16`):
            Steps of the search. 0 turns the attack off (but for `attack_objective="random"`, which takes none).
        attack_learning_rate (`float`, *optional*, defaults to `5e-2`):
            Learning rate of the search with `attack_optimizer="adamw"`.
        attack_optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"`, or `"steepest"`: steps of 2.5 * radius / attack_steps in the norm's steepest direction.
        attack_init (`str`, *optional*, defaults to `"zero"`):
            Where the search starts: `"zero"`, or `"random"` in the ball.
        attack_objective (`str`, *optional*, defaults to `"targeted"`):
            `"targeted"` brings out the rejected completion (needs preference data), `"untargeted"` suppresses the
            wanted one, `"random"` draws a perturbation of the same norm: the control.
        attack_toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the rejected completion's cross-entropy in a targeted attack.
        attack_away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `-log(1 - p)` of the wanted completion in a targeted attack. The paper's runs use 0.5 and 0.5.

        > Parameters that control the defence (the outer problem, 2407.15549 Eqs. 4-7)

        toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the wanted completion's cross-entropy, under attack.
        away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `-log(1 - p)` of the rejected completion, under attack (needs preference data).
        sft_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy on the benign dataset, not attacked. Without a benign dataset it has no effect.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the starting model (adapters off, or a frozen copy) on the benign
            dataset, not attacked, in nats a token.
        benign_per_example (`int`, *optional*, defaults to `1`):
            Benign rows that go with every row of the training dataset.
        updates_per_attack (`int`, *optional*, defaults to `1`):
            Optimiser updates made against the same perturbations. `max_steps` counts updates.
        eval_under_attack (`bool`, *optional*, defaults to `False`):
            Whether the evaluation loss is taken under attack.

    > [!NOTE]
    > Every term is a mean over its tokens in the whole accumulated batch, so that splitting a batch into micro-batches
    > changes nothing. Coefficients are used as they are (the reference code normalises them to sum to 1).
    """

    attack_sites: list[str] = field(
        default_factory=lambda: ["0.25", "0.5", "0.75", "0.94"],
        metadata={"help": "Where hidden states are perturbed: `embedding`, layer indices, or fractions of the depth."},
    )
    attack_stream: Stream = field(
        default="layer",
        metadata={"help": "Residual stream after the layer, or output of its MLP.", "choices": list(get_args(Stream))},
    )
    attack_positions: Positions = field(
        default="prompt",
        metadata={"help": "Which tokens are perturbed.", "choices": list(get_args(Positions))},
    )
    attack_norm: Norm = field(default="l2", metadata={"help": "Norm of the ball.", "choices": list(get_args(Norm))})
    attack_radius: float = field(
        default=1.0, metadata={"help": "Radius of the ball at every site. 0 turns the attack off."}
    )
    attack_radius_unit: RadiusUnit = field(
        default="absolute",
        metadata={
            "help": "Absolute, or relative to the median norm of the hidden states at the site.",
            "choices": list(get_args(RadiusUnit)),
        },
    )
    attack_ball: Ball = field(
        default="token", metadata={"help": "One ball a token, or one a row.", "choices": list(get_args(Ball))}
    )
    attack_steps: int = field(default=16, metadata={"help": "Steps of the search. 0 turns the attack off."})
    attack_learning_rate: float = field(
        default=5e-2, metadata={"help": "Learning rate of the search with the adamw optimizer."}
    )
    attack_optimizer: Optimizer = field(
        default="adamw",
        metadata={"help": "AdamW, or the norm's steepest direction.", "choices": list(get_args(Optimizer))},
    )
    attack_init: Init = field(
        default="zero", metadata={"help": "Where the search starts.", "choices": list(get_args(Init))}
    )
    attack_objective: Objective = field(
        default="targeted",
        metadata={
            "help": "Bring out the rejected completion, suppress the wanted one, or a random perturbation.",
            "choices": list(get_args(Objective)),
        },
    )
    attack_toward_coef: float = field(
        default=1.0, metadata={"help": "Weight of the rejected completion's cross-entropy in a targeted attack."}
    )
    attack_away_coef: float = field(
        default=0.0, metadata={"help": "Weight of -log(1 - p) of the wanted completion in a targeted attack."}
    )
    toward_coef: float = field(
        default=1.0, metadata={"help": "Weight of the wanted completion's cross-entropy, under attack."}
    )
    away_coef: float = field(
        default=0.0, metadata={"help": "Weight of -log(1 - p) of the rejected completion, under attack."}
    )
    sft_coef: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy on the benign dataset, not attacked."}
    )
    kl_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL divergence from the starting model on the benign dataset, not attacked."},
    )
    benign_per_example: int = field(
        default=1, metadata={"help": "Benign rows that go with every row of the training dataset."}
    )
    updates_per_attack: int = field(
        default=1, metadata={"help": "Optimiser updates made against the same perturbations."}
    )
    eval_under_attack: bool = field(
        default=False, metadata={"help": "Whether the evaluation loss is taken under attack."}
    )

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.attack_sites, str | int | float):
            self.attack_sites = [str(self.attack_sites)]
        try:
            super().__post_init__()
        except ValueError as error:
            problems.append(str(error))
        problems += self.faults()
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def threat(self) -> ThreatModel:
        """The threat model that the `attack_*` keys describe."""
        return ThreatModel(**self._threat_fields())

    @property
    def attacks(self) -> bool:
        """Whether these settings perturb anything at all."""
        searches = self.attack_objective == "random" or self.attack_steps > 0 or self.attack_init == "random"
        return self.attack_radius > 0 and searches

    @property
    def needs_prompt(self) -> bool:
        """Whether the attack perturbs prompts, so that there must be some."""
        return self.attacks and self.attack_positions in ("prompt", "last_user")

    @property
    def needs_rejected(self) -> bool:
        """Whether these settings use the rejected completions of preference data."""
        return self.away_coef != 0 or (self.attacks and self.attack_objective == "targeted")

    def _threat_fields(self) -> dict[str, Any]:
        names = ("sites", "stream", "positions", "norm", "radius", "radius_unit", "ball")
        return {name: getattr(self, f"attack_{name}") for name in names}

    def faults(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each, in the words of a recipe."""
        # The threat model knows its own faults; only the names differ.
        problems = []
        bare = object.__new__(ThreatModel)
        for name, value in self._threat_fields().items():
            object.__setattr__(bare, name, value)
        for problem in bare.faults():
            problems.append(
                problem.replace("`", "`attack_", 1) if problem.startswith("`") else f"attack_sites: {problem}"
            )
        for name, choices in (
            ("attack_optimizer", Optimizer),
            ("attack_init", Init),
            ("attack_objective", Objective),
        ):
            if getattr(self, name) not in get_args(choices):
                problems.append(f"`{name}` is {getattr(self, name)!r}; choose one of {list(get_args(choices))}.")
        coefficients = [name for name in self.__dataclass_fields__ if name.endswith("_coef") and "aux" not in name]
        for name in (*coefficients, "attack_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                problems.append(f"`{name}` is {getattr(self, name)}; it must be a finite number of at least 0.")
        for name in ("benign_per_example", "updates_per_attack"):
            if getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if not self.attack_learning_rate > 0:
            problems.append(f"`attack_learning_rate` is {self.attack_learning_rate}; it must be above 0.")
        if (
            self.attacks
            and self.attack_objective == "targeted"
            and not (self.attack_toward_coef or self.attack_away_coef)
        ):
            problems.append(
                "`attack_toward_coef` and `attack_away_coef` are both 0; the attack has nothing to minimise."
            )
        if not any((self.toward_coef, self.away_coef, self.sft_coef, self.kl_coef)):
            problems.append(
                "`toward_coef`, `away_coef`, `sft_coef` and `kl_coef` are all 0; there is nothing to train."
            )
        if self.attack_stream == "mlp" and self.attacks and self.activation_checkpointing:
            problems.append(MLP_AND_CHECKPOINTING)
        if self.updates_per_attack > 1 and self.train_sampling_strategy != "random":
            problems.append(
                f"`train_sampling_strategy: {self.train_sampling_strategy}` cannot repeat batches. Set it to random, "
                "or `updates_per_attack: 1`."
            )
        if self.updates_per_attack > 1 and self.ignore_data_skip:
            problems.append(
                "`ignore_data_skip` would go on with other rows than those of the kept perturbations. Set it to "
                "false, or `updates_per_attack: 1`."
            )
        return problems + unsupported_settings(self)
