"""What the two trainers of latent adversarial paraphrasing share around a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..objectives import PreferenceLoss
from ..threat.sites import decoder_layers
from .lap_card import paraphrase_section
from .paraphraser import Paraphraser, Update
from .robust import RobustTrainer


class ParaphrasedTrainer(RobustTrainer):
    """Mixin before a trainer of TRL. After that trainer's own constructor, [`_add_paraphraser`] is to be called."""

    _update: Update = "plain"

    def _add_paraphraser(self, preference: PreferenceLoss | None = None) -> None:
        self._check_surroundings()
        self.keeper = self.paraphraser = Paraphraser(
            self.args, self.accelerator, self.model, self._record_all, preference
        )
        if self.args.lap_match_compute:
            self._lengthen(reference=1 if preference is not None else 0)

    def _lengthen(self, reference: int) -> None:
        """Makes so many more updates that plain training costs what the settings would."""
        ratio = self.args.cost_ratio(len(decoder_layers(self.model)), reference)
        self.args = copy.copy(self.args)  # the user's own stays as it is
        if self.args.max_steps > 0:
            self.args.max_steps = round(self.args.max_steps * ratio)
        else:
            self.args.num_train_epochs *= ratio

    @property
    def _loss_scale(self) -> int:
        # TRL multiplies its loss by the number of processes where it divides by the tokens of all of them.
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _loss_of_update(self, loss: Callable[[], torch.Tensor], share: float | torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch in the branch of its update; `share` makes it its own mean, for the log."""
        first = loss()
        self._record("plain_loss" if self._update == "plain" else "perturbed_loss", first.detach() * share)
        if self._update != "both":
            return first
        with self.paraphraser.off():
            unperturbed = loss()
        self._record("plain_loss", unperturbed.detach() * share)
        return first + unperturbed

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.attacks and self.model.training and "grad_norm" in logs:
            logs = {**logs, f"grad_norm/{self._update}": logs["grad_norm"]}  # of the last update of the interval
        super().log(logs, start_time)

    @property
    def run_summary(self) -> dict[str, Any]:
        """What `run.json` says beside the usual."""
        return {"branches": self.paraphraser.summary}

    @property
    def card_section(self) -> str:
        """The model card's section on the perturbations that the model was trained under, as Markdown."""
        return paraphrase_section(self.args)
