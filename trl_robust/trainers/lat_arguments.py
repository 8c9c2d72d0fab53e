"""Settings that every trainer against latent adversaries has, beside those of TRL's configuration it extends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..inner.pgd import Init, Optimizer
from ..threat import ThreatModel
from ..threat.balls import Ball, Norm
from ..threat.model import RadiusUnit
from ..threat.positions import SPANS, Positions
from ..threat.sites import Stream, parse_site
from .checked_arguments import CheckedArguments
from .refusals import MLP_AND_CHECKPOINTING, unsupported_settings

SiteChoice = Literal["all", "random", "gradient"]
KLForm = Literal["mean", "log"]

FAITHFUL_WEIGHT_DECAY = 0.01
"""AdamW's own default, which the reference code leaves in its search."""


@dataclass
class AttackArguments(CheckedArguments):
    r"""
    The attack: the inner problem of latent adversarial training.

    Parameters:
        attack_sites (`list[str]`, *optional*, defaults to `["0.25", "0.5", "0.75", "0.94"]`):
            Where the hidden states are perturbed: `embedding`, indices of decoder layers (`8`, `-1`), or fractions of
            the depth (`0.5`). The default is the published choice, layers 8, 16, 24 and 30 of 32.
        attack_site_choice (`str`, *optional*, defaults to `"all"`):
            Which of them each micro-batch is attacked at. `"all"`. `"random"`: `attack_num_sites`, drawn anew for
            every attack. `"gradient"`: the `attack_num_sites` at which the loss falls most, to first order, when the
            ball is used up (radius x dual norm of the gradient). The last two are ours; no paper has them.
        attack_num_sites (`int`, *optional*, defaults to `1`):
            How many.
        attack_stream (`str`, *optional*, defaults to `"layer"`):
            `"layer"`: the residual stream after the layer. `"mlp"`: the output of its MLP, as the reference code.
        attack_positions (`str`, *optional*, defaults to `"prompt"`):
            Which tokens are perturbed: `"prompt"`, `"completion"`, `"all"`, or the text of `"last_user"` or
            `"all_user"` turns (conversational data).
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
            Steps of the search. 0 turns the attack off (but for `random` and `refusal_direction`, which take none).
        attack_learning_rate (`float`, *optional*, defaults to `5e-2`):
            Learning rate of the search with `attack_optimizer="adamw"` and `"sign"`.
        attack_optimizer (`str`, *optional*, defaults to `"adamw"`):
            `"adamw"`; `"steepest"`: steps of 2.5 * radius / attack_steps in the norm's steepest direction; `"sign"`:
            steps of the learning rate in every coordinate (2405.15589).
        attack_init (`str`, *optional*, defaults to `"zero"`):
            Where the search starts: `"zero"`, `"random"` in the ball, or `"warm"`: at the mean perturbation of the
            last attack, by rank of the token (ours).
        attack_objective (`str`, *optional*, defaults to `"targeted"`, in DPO to `"swapped"`):
            `"targeted"` brings out the rejected completion (needs preference data), `"untargeted"` suppresses the
            wanted one, `"swapped"` (DPO only) minimises the loss of the pair the other way round, `"random"` draws a
            perturbation of the same norm: the control, and `"refusal_direction"` removes the direction that tells
            harmful from harmless prompts (2409.20089; needs a benign dataset).
        attack_toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the rejected completion's cross-entropy in a targeted attack.
        attack_away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of `-log(1 - p)` of the wanted completion in a targeted attack. The paper's runs use 0.5 and 0.5.
        refusal_direction_every (`int`, *optional*, defaults to `4`):
            Updates after which the refusal direction is measured again, on 32 harmful and 32 harmless rows.
        refusal_direction_prob (`float`, *optional*, defaults to `0.5`):
            Share of the micro-batches from which it is removed.
        updates_per_attack (`int`, *optional*, defaults to `1`):
            Optimiser updates made against the same perturbations. `max_steps` counts updates.
        eval_under_attack (`bool`, *optional*, defaults to `False`):
            Whether the evaluation loss is taken under attack.
        trained_layers (`list[str]`, *optional*, defaults to `[]`):
            Decoder layers whose weights are trained, as `attack_sites` names layers; all of the model if empty.
            Without adapters only.
        trained_modules (`list[str]`, *optional*, defaults to `[]`):
            Modules that are trained in them, by the end of their names (`down_proj`); all if empty.
        reset_optimizer (`bool`, *optional*, defaults to `False`):
            Whether the optimiser forgets its state before every attack but the first, as in some of the published
            runs (defect D24).
        faithful (`bool`, *optional*, defaults to `False`):
            Train as the reference code did, defects included: only the last micro-batch of an accumulated step is
            attacked (D1), the KL term is divided by its own value (D8), the optimiser is made anew (D24), coefficients
            are divided by their sum, and the search has a weight decay of 0.01. For comparisons.
    """

    attack_sites: list[str] = field(
        default_factory=lambda: ["0.25", "0.5", "0.75", "0.94"],
        metadata={"help": "Where: embedding, layer indices (8, -1), or fractions of the depth (0.5)."},
    )
    attack_site_choice: SiteChoice = field(
        default="all",
        metadata={
            "help": "Which sites each attack uses: all, some at random, or those with the largest gradient.",
            "choices": list(get_args(SiteChoice)),
        },
    )
    attack_num_sites: int = field(default=1, metadata={"help": "How many sites a choice of sites takes."})
    attack_stream: Stream = field(
        default="layer",
        metadata={
            "help": "What is perturbed at a layer: its output, or its MLP's.",
            "choices": list(get_args(Stream)),
        },
    )
    attack_positions: Positions = field(
        default="prompt", metadata={"help": "Which tokens are perturbed.", "choices": list(get_args(Positions))}
    )
    attack_norm: Norm = field(default="l2", metadata={"help": "Norm of the ball.", "choices": list(get_args(Norm))})
    attack_radius: float = field(default=1.0, metadata={"help": "Radius of the ball. 0 turns the attack off."})
    attack_radius_unit: RadiusUnit = field(
        default="absolute",
        metadata={
            "help": "Unit of the radius: absolute, or relative to the median norm of the hidden states.",
            "choices": list(get_args(RadiusUnit)),
        },
    )
    attack_ball: Ball = field(
        default="token", metadata={"help": "One ball a token, or one a row.", "choices": list(get_args(Ball))}
    )
    attack_steps: int = field(default=16, metadata={"help": "Steps of the search."})
    attack_learning_rate: float = field(
        default=5e-2, metadata={"help": "Learning rate of the search (adamw and sign)."}
    )
    attack_optimizer: Optimizer = field(
        default="adamw",
        metadata={
            "help": "AdamW, the norm's steepest direction, or the sign of the gradient.",
            "choices": list(get_args(Optimizer)),
        },
    )
    attack_init: Init = field(
        default="zero", metadata={"help": "Where the search starts.", "choices": list(get_args(Init))}
    )
    attack_objective: Literal["targeted", "untargeted", "random", "refusal_direction"] = field(
        default="targeted",
        metadata={
            "help": "Bring out the rejected completion, suppress the wanted one, draw a random perturbation, or "
            "remove the refusal direction.",
            "choices": ["targeted", "untargeted", "random", "refusal_direction"],
        },
    )
    attack_toward_coef: float = field(
        default=1.0, metadata={"help": "Weight of the rejected completion's cross-entropy in a targeted attack."}
    )
    attack_away_coef: float = field(
        default=0.0, metadata={"help": "Weight of -log(1 - p) of the wanted completion in a targeted attack."}
    )
    refusal_direction_every: int = field(
        default=4, metadata={"help": "Updates after which the refusal direction is measured again."}
    )
    refusal_direction_prob: float = field(
        default=0.5, metadata={"help": "Share of the micro-batches from which the refusal direction is removed."}
    )
    updates_per_attack: int = field(
        default=1, metadata={"help": "Optimiser updates made against the same perturbations."}
    )
    eval_under_attack: bool = field(
        default=False, metadata={"help": "Whether the evaluation loss is taken under attack."}
    )
    trained_layers: list[str] = field(
        default_factory=list, metadata={"help": "Decoder layers that are trained; all of the model if empty."}
    )
    trained_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules that are trained, by the end of their names; all if empty."}
    )
    reset_optimizer: bool = field(
        default=False, metadata={"help": "Whether the optimiser forgets its state before every attack."}
    )
    faithful: bool = field(default=False, metadata={"help": "Train as the reference code did, its defects included."})

    _lists = ("attack_sites", "trained_layers", "trained_modules")

    @property
    def threat(self) -> ThreatModel:
        """The threat model that the `attack_*` keys describe."""
        return ThreatModel(**self._threat_fields())

    @property
    def attacks(self) -> bool:
        """Whether these settings perturb anything at all."""
        stepless = self.attack_objective in ("random", "refusal_direction") or self.attack_init == "random"
        return self.attack_radius > 0 and (stepless or self.attack_steps > 0)

    @property
    def positions(self) -> Positions:
        """Which tokens are perturbed."""
        return self.attack_positions

    @property
    def site_keys(self) -> dict[str, list[str]]:
        """Keys that name sites, and what they name."""
        return {"attack_sites": self.attack_sites, "trained_layers": self.trained_layers}

    @property
    def needs_prompt(self) -> bool:
        """Whether the attack needs prompts."""
        return self.attacks and (
            self.attack_positions in ("prompt", *SPANS) or self.attack_objective == "refusal_direction"
        )

    @property
    def needs_rejected(self) -> bool:
        """Whether these settings use the rejected completions of preference data."""
        return self.attacks and self.attack_objective in ("targeted", "swapped")

    @property
    def resets_optimizer(self) -> bool:
        """Whether the optimiser is to forget its state before every attack."""
        return self.reset_optimizer or self.faithful

    @property
    def attack_weights(self) -> tuple[float, float]:
        """Weights of the attack's toward and away terms, divided by their sum in a faithful run."""
        toward, away = self.attack_toward_coef, self.attack_away_coef
        total = (toward + away) if self.faithful and self.attack_objective == "targeted" else 1.0
        return toward / total, away / total

    def _threat_fields(self) -> dict[str, Any]:
        names = ("sites", "stream", "positions", "norm", "radius", "radius_unit", "ball")
        return {name: getattr(self, f"attack_{name}") for name in names}

    def _weights(self, names: tuple[str, ...]) -> dict[str, float]:
        """Coefficients of the defence's terms by name, divided by their sum in a faithful run."""
        weights = {name: float(getattr(self, f"{name}_coef", 1.0)) for name in names}
        total = sum(weights.values()) if self.faithful else 1.0
        return {name: weight / (total or 1.0) for name, weight in weights.items()}

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
        for name, item in type(self).__dataclass_fields__.items():  # type: ignore[attr-defined]
            choices = item.metadata.get("choices")
            if choices and name in ATTACK_CHOICES and getattr(self, name) not in choices:
                problems.append(f"`{name}` is {getattr(self, name)!r}; choose one of {choices}.")
        for name in ("attack_toward_coef", "attack_away_coef", "attack_steps"):
            problems += at_least_zero(self, name)
        for name in ("attack_num_sites", "updates_per_attack", "refusal_direction_every"):
            if getattr(self, name) < 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if not self.attack_learning_rate > 0:
            problems.append(f"`attack_learning_rate` is {self.attack_learning_rate}; it must be above 0.")
        if not 0 < self.refusal_direction_prob <= 1:
            problems.append(
                f"`refusal_direction_prob` is {self.refusal_direction_prob}; it must be above 0 and at most 1."
            )
        targeted = self.attacks and self.attack_objective == "targeted"
        if targeted and not (self.attack_toward_coef or self.attack_away_coef):
            problems.append(
                "`attack_toward_coef` and `attack_away_coef` are both 0; the attack has nothing to minimise."
            )
        if self.attack_site_choice != "all" and self.attack_num_sites >= len(self.attack_sites):
            problems.append(
                f"`attack_site_choice: {self.attack_site_choice}` takes {self.attack_num_sites} (`attack_num_sites`) "
                f"of {len(self.attack_sites)} sites, which leaves nothing to choose. Name more `attack_sites`, or set "
                "`attack_site_choice: all`."
            )
        if self.attack_site_choice == "gradient" and self.attack_objective in ("random", "refusal_direction"):
            problems.append(
                f"`attack_site_choice: gradient` goes by the attack's gradient, and `attack_objective: "
                f"{self.attack_objective}` has none. Use `attack_site_choice: random` or `all`."
            )
        for layer in self.trained_layers:
            try:
                if parse_site(layer) == "embedding":
                    problems.append("`trained_layers` names decoder layers; `embedding` is none.")
            except ValueError as error:
                problems.append(f"trained_layers: {error}")
        if self.attack_stream == "mlp" and self.attacks and self.activation_checkpointing:  # type: ignore[attr-defined]
            problems.append(MLP_AND_CHECKPOINTING)
        if self.updates_per_attack > 1 and self.train_sampling_strategy != "random":  # type: ignore[attr-defined]
            problems.append(
                f"`train_sampling_strategy: {self.train_sampling_strategy}` cannot repeat batches. "  # type: ignore[attr-defined]
                "Set it to random, or `updates_per_attack: 1`."
            )
        if self.updates_per_attack > 1 and self.ignore_data_skip:  # type: ignore[attr-defined]
            problems.append(
                "`ignore_data_skip` would go on with other rows than those of the kept perturbations. Set it to "
                "false, or `updates_per_attack: 1`."
            )
        return problems + unsupported_settings(self)


ATTACK_CHOICES = ("attack_optimizer", "attack_init", "attack_objective", "attack_site_choice", "kl_form", "away_loss")
"""Keys whose choices are looked at here; the threat model looks at its own."""


@dataclass
class BenignTermArguments:
    r"""
    What keeps a model useful: terms on benign rows, never attacked.

    Parameters:
        sft_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy on the benign dataset. Without a benign dataset it has no effect.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence from the starting model (adapters off, or a frozen copy) on the benign
            dataset, in nats a token.
        kl_form (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: the divergence itself. `"log"`: divided by its own value, as the reference code does (D8): a
            log-KL, whose pull is strongest where the two models nearly agree.
        benign_per_example (`int`, *optional*, defaults to `1`):
            Benign rows that go with every row of the training dataset.
    """

    sft_coef: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy on the benign dataset, not attacked."}
    )
    kl_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL divergence from the starting model on the benign dataset, not attacked."},
    )
    kl_form: KLForm = field(
        default="mean",
        metadata={
            "help": "The divergence itself, or divided by its own value as in the reference code.",
            "choices": list(get_args(KLForm)),
        },
    )
    benign_per_example: int = field(
        default=1, metadata={"help": "Benign rows that go with every row of the training dataset."}
    )

    def benign_faults(self) -> list[str]:
        """What is wrong with these settings, one sentence each."""
        problems = at_least_zero(self, "sft_coef") + at_least_zero(self, "kl_coef")
        if self.benign_per_example < 1:
            problems.append(f"`benign_per_example` is {self.benign_per_example}; it must be at least 1.")
        return problems


def at_least_zero(settings: Any, name: str) -> list[str]:
    """The fault of a number that is negative or not finite."""
    value = getattr(settings, name)
    return [] if 0 <= value < float("inf") else [f"`{name}` is {value}; it must be a finite number of at least 0."]
