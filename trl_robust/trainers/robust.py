"""What every trainer of this package adds to TRL's around a step: the cost, the log, the checkpoints, the card.

The step itself (`training_step`, `compute_loss`) stands in each trainer's own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .._compat import keep_4bit_differentiable
from .refusals import check_distribution, check_model


class Keeper(Protocol):
    """What perturbs the model in a training: it counts its cost, and remembers what a resumed run needs."""

    passes: float

    def off(self) -> AbstractContextManager[None]:
        """Forward passes in this block run without a perturbation."""

    def save(self, folder: Path, forward_passes: float, main: bool) -> None:
        """Writes what it remembers into a checkpoint."""

    def load(self, folder: Path) -> None:
        """Reads it again."""


class RobustTrainer(ABC):
    """Mixin before a trainer of TRL, which makes its `keeper` after that trainer's own constructor."""

    args: Any
    accelerator: Any
    is_world_process_zero: Any
    keeper: Keeper
    model: Any
    state: Any
    _metrics: Any
    _get_output_dir: Any

    @property
    @abstractmethod
    def card_section(self) -> str:
        """The model card's section on what the model was trained against, as Markdown."""

    @property
    def run_summary(self) -> dict[str, Any]:
        """What `run.json` says beside the usual."""
        return {}

    def _check_surroundings(self) -> None:
        """Refuses models and launchers under which perturbations would not work."""
        check_model(self.model, self.args)
        check_distribution(self.accelerator)
        if self.accelerator.device.type == "cpu":
            keep_4bit_differentiable(self.model)

    @property
    def forward_passes(self) -> float:
        """
        Cost of the training so far, in forward passes of one row through the whole model, over all processes.

        A backward pass to the activations counts as one more, a training pass as three. Every process must ask.
        """
        own = torch.tensor(self.keeper.passes, dtype=torch.float64, device="cpu")
        if self.accelerator.num_processes == 1:
            return own.item()
        return self.accelerator.gather(own.float().to(self.accelerator.device)).sum().item()

    def _record(self, name: str, value: float | torch.Tensor) -> None:
        self._record_all({name: value})

    def _record_all(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Notes values for the log, as means over processes; all of them must note the same names."""
        device = self.accelerator.device
        own = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
        means = self.accelerator.gather(own.unsqueeze(0)).mean(0).tolist()
        mode = "train" if self.model.training else "eval"
        for name, mean in zip(values, means, strict=True):
            self._metrics[mode][name].append(mean)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.attacks and self.model.training:
            self._metrics["train"]["forward_passes"] = [self.forward_passes]
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Ours first: a checkpoint counts from when TRL writes the trainer's state, and must be whole by then.
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.keeper.save(folder, self.forward_passes, self.is_world_process_zero())
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        # PEFT loads the bfloat16 adapters that TRL gives a 4-bit model as float32: another precision than before.
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])
        self.keeper.load(Path(resume_from_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        card = Path(str(self.args.output_dir)) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            card.write_text(card.read_text(encoding="utf-8") + self.card_section, encoding="utf-8")
