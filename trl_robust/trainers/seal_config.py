from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from trl import SFTConfig

from ..objectives import PreferenceLoss, PreferenceType
from ..selection.functions import SelectorFunction, check_function
from ..selection.learner import SelectorOptimizer
from ..selection.penalty import PenaltyAlgorithm, PenaltySchedule
from .checked_arguments import CheckedArguments
from .refusals import unsupported_settings

SelectionMethod = Literal["seal", "none", "random", "safe_loss", "loss_gap", "dsir", "safe_instr"]

TRAINED: tuple[SelectionMethod, ...] = ("seal", "safe_loss", "loss_gap")
"""Methods that train a model; the others look at the rows alone."""


@dataclass
class SEALConfig(CheckedArguments, SFTConfig):
    r"""
    Configuration class for the [`SEALTrainer`].

    All that is not named here is [`~trl.SFTConfig`]'s: `learning_rate`, its schedule and the optimiser are those of
    both models; one epoch visits every row of the training data once.

    Parameters:
        selection_method (`str`, *optional*, defaults to `"seal"`):
            What ranks the rows. `"seal"`: the bilevel selector. Baselines that train: `"safe_loss"`, a model trained
            on the safe set alone, for as many updates, then rows by its loss; `"loss_gap"`, both models trained with
            all weights at 1, then rows by the difference of their losses. Baselines without a model, made by
            `trl-robust seal`: `"none"` (all rows), `"random"`, `"dsir"` (n-gram importance, 2302.03169),
            `"safe_instr"` (all rows, and a few safe ones mixed in, 2309.07875).
        selector_function (`str`, *optional*, defaults to `"softmax"`):
            From logits to weights: `"softmax"`, `"sigmoid"`, `"relu"`, or `"tanh"` (1 + tanh, which is the sigmoid of
            twice the logit). Weights have mean 1 and are never negative.
        selector_normalized (`bool`, *optional*, defaults to `True`):
            Whether weights are divided by their mean. Without it all of them can shrink together (softmax cannot).
        selector_optimizer (`str`, *optional*, defaults to `"sgd"`):
            `"sgd"`, `"exponentiated_gradient"` (softmax only), or `"adam"`, the reference code's, which ranks rows by
            when they were last seen as well (seal.md 4).
        selector_learning_rate (`float`, *optional*):
            Learning rate of the logits; `0.25 * rows of an update / num_train_epochs` for SGD, `0.25 /
            num_train_epochs` for exponentiated gradient and `4e-3` for Adam if not given. 0 keeps all weights at 1:
            without a safe set, that is plain SFT, bit for bit as TRL's.
        selector_average (`bool`, *optional*, defaults to `False`):
            Whether rows are ranked by the mean of their logits over the updates of the last epoch, rather than by the
            last one. That smooths Adam's transients. With SGD, which has none, it gives the last visit of a row the
            less weight the later it comes, and so ranks by time as well (docs/seal.md).
        penalty_strength (`float`, *optional*, defaults to `0.5`):
            Gamma: weight of the training data's loss; that of the safe set's is 1 - gamma. The paper begins at 0.
        penalty_increment (`float`, *optional*, defaults to `0.0`):
            Added to gamma at the start of every later epoch. (The paper's Llama-3: 0.03. In its code,
            `upperlevel_weight` is 1 - `penalty_strength`, and `upperlevel_weight_decay` is this.)
        penalty_max (`float`, *optional*, defaults to `1.0`):
            Gamma is never above it.
        penalty_ramp (`float`, *optional*, defaults to `0.0`):
            Share of the training over which gamma rises linearly from 0.
        penalty_algorithm (`str`, *optional*, defaults to `"auxiliary"`):
            `"auxiliary"`: Algorithm 1, with a second adapter that is trained on the weighted data alone.
            `"memory_efficient"`: Algorithm 2 without it, which ranks by loss and warns.
        safe_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the safe set that is used: a random subset, drawn by `seed`.
        keep_fraction (`float`, *optional*, defaults to `0.8`):
            Share of the rows that `trl-robust seal` keeps.
        label_column (`str`, *optional*):
            Column that says of every row whether it is harmful (true, or not 0). Only the report looks at it, for how
            well rows were told apart.
        source_column (`str`, *optional*):
            Column with the source of every row. Only the report looks at it.
        show_rows (`bool`, *optional*, defaults to `False`):
            Whether the report shows what rows say, which may be harmful.
        preference_loss (`str`, *optional*, defaults to `"sigmoid"`):
            Loss of a row that is a pair (`chosen`, `rejected`): `"sigmoid"` (DPO), `"ipo"` or `"robust"`; the
            reference is the model as it is before training.
        preference_beta (`float`, *optional*, defaults to `0.1`):
            Its pull to the reference.
        preference_label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the pairs that `"robust"` takes to be the wrong way round.
    """

    selection_method: SelectionMethod = field(
        default="seal",
        metadata={
            "help": "What ranks the rows: the selector, or a baseline.",
            "choices": list(get_args(SelectionMethod)),
        },
    )
    selector_function: str = field(
        default="softmax", metadata={"help": f"From logits to weights: one of {list(get_args(SelectorFunction))}."}
    )
    selector_normalized: bool = field(default=True, metadata={"help": "Divide weights by their mean."})
    selector_optimizer: SelectorOptimizer = field(
        default="sgd",
        metadata={
            "help": "Optimiser of the logits; adam is the reference code's.",
            "choices": list(get_args(SelectorOptimizer)),
        },
    )
    selector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the logits; from batch and epochs if not given."}
    )
    selector_average: bool = field(default=False, metadata={"help": "Rank by the mean logits of the last epoch."})
    penalty_strength: float = field(default=0.5, metadata={"help": "Gamma: weight of the training data's loss."})
    penalty_increment: float = field(default=0.0, metadata={"help": "Added to gamma at every later epoch."})
    penalty_max: float = field(default=1.0, metadata={"help": "Gamma is never above it."})
    penalty_ramp: float = field(default=0.0, metadata={"help": "Share of the training over which gamma rises from 0."})
    penalty_algorithm: PenaltyAlgorithm = field(
        default="auxiliary",
        metadata={
            "help": "With a second adapter (Algorithm 1), or without.",
            "choices": list(get_args(PenaltyAlgorithm)),
        },
    )
    safe_fraction: float = field(default=1.0, metadata={"help": "Share of the safe set that is used."})
    keep_fraction: float = field(default=0.8, metadata={"help": "Share of the rows that is kept."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column that says whether a row is harmful; only the report looks at it."}
    )
    source_column: str | None = field(
        default=None, metadata={"help": "Column with the source of a row; only the report looks at it."}
    )
    show_rows: bool = field(default=False, metadata={"help": "Show what rows say in the report."})
    preference_loss: PreferenceType = field(
        default="sigmoid",
        metadata={"help": "Loss of a row that is a pair.", "choices": list(get_args(PreferenceType))},
    )
    preference_beta: float = field(default=0.1, metadata={"help": "Its pull to the reference."})
    preference_label_smoothing: float = field(default=0.0, metadata={"help": "For robust: share of wrong pairs."})

    def faults(self) -> list[str]:
        """Everything that is wrong with the settings, one sentence each."""
        problems = [problem for problem in unsupported_settings(self) if "prompts that are attacked" not in problem]
        try:
            check_function(self.selector_function)
        except ValueError as error:
            problems.append(str(error))
        for name in ("penalty_strength", "penalty_max", "penalty_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it must be from 0 to 1.")
        for name in ("safe_fraction", "keep_fraction"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(f"`{name}` is {getattr(self, name)}; it is a share, above 0 and at most 1.")
        if not math.isfinite(self.penalty_increment):
            problems.append(f"`penalty_increment` is {self.penalty_increment}; it must be a number.")
        rate = self.selector_learning_rate
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            problems.append(f"`selector_learning_rate` is {rate}; it must be at least 0.")
        if self.selector_optimizer == "exponentiated_gradient" and self.selector_function != "softmax":
            problems.append(
                "`selector_optimizer: exponentiated_gradient` multiplies the weights of a softmax, and "
                f"`selector_function` is {self.selector_function}. Use `sgd`, or `softmax`."
            )
        if self.preference_beta <= 0:
            problems.append(f"`preference_beta` is {self.preference_beta}; it must be above 0.")
        if not 0 <= self.preference_label_smoothing < 0.5:
            problems.append(
                f"`preference_label_smoothing` is {self.preference_label_smoothing}; it must be from 0 to below 0.5."
            )
        if self.dataloader_drop_last:
            problems.append(
                "`dataloader_drop_last` leaves rows out of every epoch, and a row that is never seen cannot be "
                "ranked. Remove it."
            )
        if self.push_to_hub:
            problems.append(
                "`push_to_hub` pushes a model, and what this verb leaves is a selector. Remove it, and upload the "
                "folder (`hf upload`)."
            )
        if self.load_best_model_at_end:
            problems.append(
                "`load_best_model_at_end` chooses a model, and a selector comes of the whole run. Remove it."
            )
        return problems

    @property
    def attacks(self) -> bool:
        """Whether the training is more than SFT with fixed weights."""
        return self.selection_method != "seal" or self.selector_learning_rate != 0

    @property
    def uses_auxiliary(self) -> bool:
        """Whether there is a second model."""
        if self.selection_method == "seal":
            return self.penalty_algorithm == "auxiliary"
        return self.selection_method == "loss_gap"

    @property
    def needs_prompt(self) -> bool:
        """Whether prompts are required; they never are."""
        return False

    @property
    def site_keys(self) -> dict[str, list[str]]:
        """Settings that name layers, of which there are none."""
        return {}

    @property
    def schedule(self) -> PenaltySchedule:
        """How strong the penalty is at every update."""
        if self.selection_method == "safe_loss":
            return PenaltySchedule(0.0)
        return PenaltySchedule(self.penalty_strength, self.penalty_increment, self.penalty_max, self.penalty_ramp)

    @property
    def preference(self) -> PreferenceLoss:
        """Loss of pairs."""
        return PreferenceLoss(self.preference_loss, self.preference_beta, self.preference_label_smoothing)

    def logits_learning_rate(self, rows: int) -> float:
        """
        Learning rate of the selector's logits.

        Args:
            rows (`int`):
                Rows of an update, over micro-batches and processes.

        Returns:
            `float`: what was given, or what keeps the selector stable over the epochs of the training (seal.md 4).
        """
        if self.selection_method != "seal":
            return 0.0
        if self.selector_learning_rate is not None:
            return self.selector_learning_rate
        epochs = max(self.num_train_epochs, 1.0)
        usual = {"sgd": 0.25 * rows / epochs, "exponentiated_gradient": 0.25 / epochs, "adam": 4e-3}
        return usual[self.selector_optimizer]

    def describe(self) -> dict[str, Any]:
        """What a saved selector says of how it came about; plain values."""
        names = (
            *("selector_function", "selector_normalized", "selector_optimizer", "selector_learning_rate"),
            *("selector_average", "penalty_strength", "penalty_increment", "penalty_max", "penalty_ramp"),
            *("penalty_algorithm", "safe_fraction", "learning_rate", "num_train_epochs", "max_steps", "seed"),
        )
        return {"method": self.selection_method, **{name: getattr(self, name) for name in names}}
