from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from trl import SFTConfig

from .lat_arguments import AttackArguments, BenignTermArguments, at_least_zero

AwayLoss = Literal["unlikelihood", "gradient_ascent"]


@dataclass
class LATSFTConfig(BenignTermArguments, AttackArguments, SFTConfig):
    r"""
    Configuration class for the [`LATSFTTrainer`].

    The attack's settings are those of [`AttackArguments`], those of the benign terms stand in
    [`BenignTermArguments`], and all that is not named here is [`~trl.SFTConfig`]'s.

    Parameters:
        toward_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the wanted completion's cross-entropy, under attack.
        away_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the rejected completion's away loss, under attack (needs preference data).
        away_loss (`str`, *optional*, defaults to `"unlikelihood"`):
            `"unlikelihood"`: `-log(1 - p)` (2407.15549). `"gradient_ascent"`: the log-likelihood itself, which has no
            floor unless `away_cutoff` gives it one.
        toward_cutoff (`float`, *optional*, defaults to `0.0`):
            Mean cross-entropy of a wanted completion below which it counts as learned (2405.15589 uses 0.5).
        away_cutoff (`float`, *optional*, defaults to `inf`):
            Mean cross-entropy of a rejected completion above which gradient ascent counts as done (2405.15589 uses 5).

    > [!NOTE]
    > Every term is a mean over its tokens in the whole accumulated batch, so that splitting a batch into micro-batches
    > changes nothing (but for `kl_form: log`, which divides by each micro-batch's own value, and a choice of sites by
    > gradient). Coefficients are used as they are (the reference code normalises them to sum to 1; `faithful`).
    """

    toward_coef: float = field(
        default=1.0, metadata={"help": "Weight of the wanted completion's cross-entropy, under attack."}
    )
    away_coef: float = field(
        default=0.0, metadata={"help": "Weight of the rejected completion's away loss, under attack."}
    )
    away_loss: AwayLoss = field(
        default="unlikelihood",
        metadata={
            "help": "-log(1 - p) of the rejected completion, or its log-likelihood.",
            "choices": list(get_args(AwayLoss)),
        },
    )
    toward_cutoff: float = field(
        default=0.0, metadata={"help": "Mean cross-entropy below which a wanted completion counts as learned."}
    )
    away_cutoff: float = field(
        default=float("inf"),
        metadata={"help": "Mean cross-entropy above which gradient ascent on a rejected completion counts as done."},
    )

    @property
    def needs_rejected(self) -> bool:
        return self.away_coef != 0 or super().needs_rejected

    def weights(self, benign: bool) -> dict[str, float]:
        """
        Weights of the terms of the loss.

        Args:
            benign (`bool`):
                Whether there are benign rows.

        Returns:
            `dict`: `toward`, `away`, and with benign rows `sft` and `kl`.
        """
        return self._weights(("toward", "away", *(("sft", "kl") if benign else ())))

    def faults(self) -> list[str]:
        problems = super().faults() + self.benign_faults()
        for name in ("toward_coef", "away_coef", "toward_cutoff"):
            problems += at_least_zero(self, name)
        if not self.away_cutoff > 0:
            problems.append(f"`away_cutoff` is {self.away_cutoff}; it must be above 0.")
        if self.away_cutoff != float("inf") and self.away_loss != "gradient_ascent":
            problems.append(
                "`away_cutoff` belongs to `away_loss: gradient_ascent`; unlikelihood has a floor of its own."
            )
        if not any((self.toward_coef, self.away_coef, self.sft_coef, self.kl_coef)):
            problems.append(
                "`toward_coef`, `away_coef`, `sft_coef` and `kl_coef` are all 0; there is nothing to train."
            )
        return problems
