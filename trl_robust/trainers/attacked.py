"""What every trainer with an adversary adds around a step: the sampler, the measuring, the counts of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..objectives import LabelLogits, PreferenceLoss
from ..threat.sites import decoder_layers, resolve_sites
from .adversary import Adversary
from .frozen_base import FrozenBase
from .repeat_sampler import RepeatedBlockSampler
from .robust import RobustTrainer
from .threat_card import threat_section


class AttackedTrainer(RobustTrainer):
    """Mixin before a trainer of TRL. After that trainer's own constructor, [`_add_adversary`] is to be called."""

    data_collator: Any
    optimizer: Any
    train_dataset: Any
    _prepare_inputs: Any
    current_gradient_accumulation_steps: int

    def _add_adversary(
        self,
        preference: PreferenceLoss | None = None,
        *,
        layers: Sequence[str] | None = None,
        modules: Sequence[str] | None = None,
    ) -> None:
        """Checks the model, freezes all but some modules of some layers, and makes the adversary."""
        self._check_surroundings()
        train_only(
            self.model,
            self.args.trained_layers if layers is None else layers,
            self.args.trained_modules if modules is None else modules,
        )
        self.keeper = self.adversary = Adversary(
            self.args, self.accelerator, self.model, self._sample_batches, self._record, preference
        )
        self.base: FrozenBase | None = None
        self._term_tokens: dict[str, torch.Tensor] = {}

    def _labels_by_term(self, batches: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
        """Labels of the terms whose tokens TRL does not count, by the name of the term."""
        return {"benign": [batch["benign"]["labels"] for batch in batches if "benign" in batch]}

    def _sample_batches(self, count: int) -> Sequence[dict[str, Any]]:
        """So many rows of the training data, evenly spread, as the adversary measures on them."""
        count = min(count, len(self.train_dataset))
        stride = len(self.train_dataset) // count
        rows = [self.train_dataset[number * stride] for number in range(count)]
        size = self.args.per_device_train_batch_size
        return [
            self._prepare_inputs(self._attack_batch(self.data_collator(rows[start : start + size]), wanted=True))
            for start in range(0, count, size)
        ]

    @abstractmethod
    def _attack_batch(self, inputs: dict[str, Any], *, wanted: bool = False) -> dict[str, Any]:
        """
        A batch as the adversary takes it.

        Args:
            inputs (`dict`):
                A batch of the data loader.
            wanted (`bool`, *optional*, defaults to `False`):
                Whether the wanted completions stay where the adversary's own are otherwise.
        """

    # Around the step

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.updates_per_attack == 1:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        block = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return RepeatedBlockSampler(rows, block, self.args.updates_per_attack, seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        # TRL counts the labels of the wanted completions, if any; the other terms need counts of their own.
        for name, labels in self._labels_by_term(batches).items():
            count = torch.tensor(sum(int((part[:, 1:] != -100).sum()) for part in labels), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            self._term_tokens[name] = count
        return batches, num_items_in_batch

    def _before_attack(self) -> None:
        """To be called before every micro-batch: makes the optimiser new where a new attack begins, if asked to."""
        step = self.state.global_step
        if self.args.resets_optimizer and step > 0 and self.adversary.starts_attack(step):
            self.optimizer.state.clear()  # AdamW makes it anew at its next step

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.adversary.start_evaluation()
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    @property
    def _loss_scale(self) -> int:
        # DDP averages gradients over processes; a sum over the tokens of all of them divided by their number wants
        # the sum instead. TRL scales its own term in the same way.
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _token_mean(
        self, name: str, counted: str, found: LabelLogits, total: torch.Tensor, *, divided: bool
    ) -> torch.Tensor:
        """
        A micro-batch's share of a term's mean over the tokens of the accumulated batch; its own mean goes to the log.

        Args:
            name (`str`):
                Of the term, in the log.
            counted (`str`):
                Under which name its tokens were counted.
            found ([`LabelLogits`]):
                Logits of the term's batch.
            total (`torch.Tensor`):
                The term's sum over the tokens of this micro-batch.
            divided (`bool`):
                Whether the Trainer will divide the loss by the accumulation steps.
        """
        own = max(len(found.targets), 1)
        self._record(f"{name}_loss", total.detach() / own)
        if counted not in self._term_tokens:  # a step outside `train`: the micro-batch is all there is
            return total / own
        scale = self._loss_scale * (self.current_gradient_accumulation_steps if divided else 1)
        return total / self._term_tokens[counted].clamp(min=1) * scale

    @property
    def card_section(self) -> str:
        """The model card's section on what the model was trained against, as Markdown."""
        return threat_section(self.args, self.adversary.threat)


def train_only(model: nn.Module, layers: Sequence[str], modules: Sequence[str]) -> None:
    """
    Freezes everything but some modules of some decoder layers.

    Args:
        model (`nn.Module`):
            The model.
        layers (sequence of `str`):
            Layers as `attack_sites` names them; all, and what lies outside them, if empty.
        modules (sequence of `str`):
            Ends of the names of the modules that are trained; all if empty.

    Raises:
        `ValueError`: the model has adapters, or nothing would be trained.
    """
    if not layers and not modules:
        return
    if hasattr(model, "peft_config"):
        raise ValueError(
            "`trained_layers` and `trained_modules` choose among the model's own weights, and it has adapters, which "
            "are all that is trained. Use `lora_target_modules` and `layers_to_transform`, or train without adapters."
        )
    stack = decoder_layers(model)
    chosen = resolve_sites(layers, len(stack)) if layers else range(len(stack))
    kept = set()
    for number in chosen:
        for name, module in stack[int(number)].named_modules():
            if not modules or any(name == end or name.endswith(f".{end}") for end in modules):
                kept |= {id(parameter) for parameter in module.parameters()}
    if not kept:
        raise ValueError(
            f"`trained_modules` {list(modules)} are the end of no module's name in the layers that are trained. Those "
            f"are {[name for name, module in stack[0].named_modules() if not list(module.children()) and name][:6]} "
            "and so on."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
