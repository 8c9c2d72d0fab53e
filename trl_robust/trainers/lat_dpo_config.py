from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from trl import DPOConfig

from ..objectives import PreferenceLoss, PreferenceType
from .lat_arguments import AttackArguments, BenignTermArguments


@dataclass
class LATDPOConfig(BenignTermArguments, AttackArguments, DPOConfig):
    r"""
    Configuration class for the [`LATDPOTrainer`].

    The attack's settings are those of [`AttackArguments`], those of the benign terms stand in
    [`BenignTermArguments`], and all that is not named here is [`~trl.DPOConfig`]'s.

    Parameters:
        attack_objective (`str`, *optional*, defaults to `"swapped"`):
            `"swapped"`: the DPO loss with the pair swapped (2407.15549, backdoors); for the loss types sigmoid, ipo
            and robust. The others as in [`AttackArguments`].
    """

    attack_objective: Literal["swapped", "targeted", "untargeted", "random", "refusal_direction"] = field(  # type: ignore[assignment]
        default="swapped",
        metadata={
            "help": "Minimise the loss of the swapped pair, bring out the rejected completion, suppress the wanted "
            "one, draw a random perturbation, or remove the refusal direction.",
            "choices": ["swapped", "targeted", "untargeted", "random", "refusal_direction"],
        },
    )

    @property
    def preference(self) -> PreferenceLoss:
        """The loss that a swapped attack minimises."""
        return PreferenceLoss(self.loss_type[0], self.beta, self.label_smoothing)  # type: ignore[arg-type]

    def weights(self, benign: bool) -> dict[str, float]:
        """
        Weights of the terms of the loss.

        Args:
            benign (`bool`):
                Whether there are benign rows.

        Returns:
            `dict`: `dpo`, and with benign rows `sft` and `kl`.
        """
        return self._weights(("dpo", *(("sft", "kl") if benign else ())))

    def faults(self) -> list[str]:
        problems = super().faults() + self.benign_faults()
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.label_smoothing and not {"robust", "exo_pair", "aot", "aot_unpaired"} & set(kinds):
            problems.append(
                f"`label_smoothing` is {self.label_smoothing}, and TRL's `loss_type: {', '.join(kinds)}` does not "
                "look at it. Use `loss_type: robust`, the sigmoid with label smoothing, or set it to 0."
            )
        if "robust" in kinds and not 0 <= self.label_smoothing < 0.5:
            problems.append(f"`label_smoothing` is {self.label_smoothing}; it must be at least 0 and below 0.5.")
        swapped = self.attacks and self.attack_objective == "swapped"
        plain = self.f_divergence_type == "reverse_kl" and self.ld_alpha is None
        if swapped and not (len(kinds) == 1 and kinds[0] in get_args(PreferenceType) and plain):
            problems.append(
                f"`attack_objective: swapped` minimises the DPO loss itself, and knows `loss_type` "
                f"{list(get_args(PreferenceType))} with `f_divergence_type: reverse_kl` and no `ld_alpha`. Use one of "
                "these, or `attack_objective: targeted`."
            )
        if self.attacks and self.sync_ref_model:
            problems.append(
                "`sync_ref_model` changes the reference during training, and the attack needs one that stays. Set "
                "`sync_ref_model: false`."
            )
        return problems
