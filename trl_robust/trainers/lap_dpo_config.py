from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from trl import DPOConfig

from ..objectives import PreferenceLoss, PreferenceType
from .lap_arguments import ParaphraseArguments


@dataclass
class LAPDPOConfig(ParaphraseArguments, DPOConfig):
    r"""
    Configuration class for the [`LAPDPOTrainer`].

    The settings of the search are those of [`ParaphraseArguments`], and all that is not named there is
    [`~trl.DPOConfig`]'s.
    """

    @property
    def preference(self) -> PreferenceLoss:
        """The loss that is kept."""
        return PreferenceLoss(self.loss_type[0], self.beta, self.label_smoothing)  # type: ignore[arg-type]

    def faults(self) -> list[str]:
        problems = super().faults()
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        plain = self.f_divergence_type == "reverse_kl" and self.ld_alpha is None
        if self.attacks and not (len(kinds) == 1 and kinds[0] in get_args(PreferenceType) and plain):
            problems.append(
                f"The search keeps the DPO loss itself, and knows `loss_type` {list(get_args(PreferenceType))} with "
                "`f_divergence_type: reverse_kl` and no `ld_alpha`. Use one of these."
            )
        if "robust" in kinds and not 0 <= self.label_smoothing < 0.5:
            problems.append(f"`label_smoothing` is {self.label_smoothing}; it must be at least 0 and below 0.5.")
        if self.attacks and self.lap_search == "untargeted":
            problems.append("`lap_search: untargeted` is for SFT. For pairs use `trl-robust lat-dpo`.")
        if self.attacks and self.lap_positions in ("all", "completion"):
            problems.append(
                f"`lap_positions: {self.lap_positions}` perturbs completions, and a pair has two of them, which share "
                "a perturbation. Use prompt, last_user or all_user."
            )
        if self.attacks and self.sync_ref_model:
            problems.append(
                "`sync_ref_model` changes the reference during training, and the search needs one that stays. Set "
                "`sync_ref_model: false`."
            )
        return problems
