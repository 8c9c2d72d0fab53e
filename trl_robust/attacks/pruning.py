from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..inner import attack_mode, hidden_after
from ..threat import decoder_layers
from .linears import answered_under, block_linears, features, weight_of
from .subject import AttackRow, Generation, Subject


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """
    Importance of every weight: its size times the length of the input that it multiplies (2306.11695, Eq. 1).

    Args:
        weight (`torch.Tensor` of shape `(O, I)`):
            Weight of a linear layer.
        norms (`torch.Tensor` of shape `(I,)`):
            L2 norm of every input feature over all calibration tokens.

    Returns:
        `torch.Tensor` of shape `(O, I)`, float32.
    """
    return weight.detach().float().abs() * norms.float().to(weight.device)


def pruned_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """
    The weights with the lowest scores, output by output.

    Args:
        scores (`torch.Tensor` of shape `(O, I)`):
            Scores; of equal ones the first go first.
        sparsity (`float`):
            Share of every row, to the nearest whole weight.

    Returns:
        `torch.Tensor` of shape `(O, I)`, bool: true at `round(sparsity * I)` weights of every row.
    """
    count = round(sparsity * scores.shape[1])
    lowest = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


@dataclass(frozen=True)
class Pruning:
    """
    Sets a share of the weights to zero (Wanda, 2306.11695), then the requests as they are. The weights come back.

    Block by block, as published: the calibration prompts run through the blocks that are pruned already, and every
    output of a linear layer loses the weights whose size times input norm is lowest. The embedding, the head and
    what is not a linear layer stay.

    Args:
        examples (`list[dict]`):
            Calibration rows of `prompt`, plain or conversational.
        sparsity (`float`, *optional*, defaults to `0.3`):
            Share of the weights of every output, from 0 to below 1.
        objective (`str`, *optional*, defaults to `"wanda"`):
            `"wanda"`, or `"random"`: as many weights of every output drawn at random, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.

    Raises:
        `ValueError`: no examples or an impossible sparsity; when run, a quantised model or one whose blocks hold
            matrices outside linear layers (fused experts).
    """

    examples: list[dict[str, Any]] = field(repr=False)
    sparsity: float = 0.3
    objective: Literal["wanda", "random"] = "wanda"
    seed: int = 0
    name: ClassVar[str] = "pruning"
    attack_class: ClassVar[str] = "weights"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "sparsity"

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("The pruning attack has no examples; give calibration rows of `prompt`.")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`sparsity` is {self.sparsity}; it must be at least 0 and below 1.")
        if self.objective not in ("wanda", "random"):
            raise ValueError(f"`objective` is {self.objective!r}; choose `wanda` or `random`.")

    def check(self, subject: Subject) -> None:
        """
        Refuses models whose weights cannot be pruned.

        Args:
            subject ([`Subject`]):
                The model.

        Raises:
            `ValueError`: the model is quantised, or its blocks hold matrices outside linear layers.
        """
        if getattr(subject.model, "is_quantized", False):
            raise ValueError(
                "Pruning sets single weights to zero, which a quantised model does not allow. Attack the model in "
                "bfloat16 or float32."
            )
        known = {id(parameter) for _, _, layer in block_linears(subject.model) for parameter in layer.parameters()}
        other = [
            name
            for name, parameter in decoder_layers(subject.model).named_parameters()
            if parameter.dim() >= 2 and id(parameter) not in known and not _of_an_adapter(subject.model, parameter)
        ]
        if other:
            raise ValueError(
                f"The decoder blocks hold matrices outside linear layers ({', '.join(other[:3])}), so the sparsity "
                "that was asked for could not be reached. Attack such a mixture of experts in another way."
            )

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the pruned model; see [`Subject.answer`]."""
        return answered_under(self.applied(subject), rows, lambda: subject.answer(rows, self.name))

    @contextmanager
    def applied(self, subject: Subject) -> Iterator[None]:
        """The model with its weights pruned, until the block is left."""
        self.check(subject)
        layers = [(number, layer) for number, _, layer in block_linears(subject.model)]
        before = [layer.weight.detach().to("cpu", copy=True) for _, layer in layers]
        adapter = subject.model if hasattr(subject.model, "merge_adapter") else None
        try:
            if adapter is not None:
                adapter.merge_adapter()  # what is pruned is the sum that answers
            self._prune(subject, layers)
            yield
        finally:
            if adapter is not None:
                adapter.unmerge_adapter()
            with torch.no_grad():
                for (_, layer), weight in zip(layers, before, strict=True):
                    layer.weight.copy_(weight)  # bit for bit, which taking the adapter out again is not

    @torch.no_grad()
    def _prune(self, subject: Subject, layers: list[tuple[int, Any]]) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        blocks = sorted({number for number, _ in layers}) if round(self.sparsity, 12) else []
        for block in subject.track(blocks, "pruning"):
            inside = [layer for number, layer in layers if number == block]
            norms = self._input_norms(subject, block, inside) if self.objective == "wanda" else [None] * len(inside)
            for layer, norm in zip(inside, norms, strict=True):
                weight = weight_of(layer)
                scores = torch.rand(weight.shape, generator=generator) if norm is None else wanda_scores(weight, norm)
                if not scores.isfinite().all():
                    raise FloatingPointError("hidden states or weights are not finite")
                weight.masked_fill_(pruned_mask(scores.to(weight.device), self.sparsity), 0)

    def _input_norms(self, subject: Subject, block: int, layers: Sequence[Any]) -> list[torch.Tensor]:
        """L2 norm of every input of the layers over all real tokens of the calibration prompts."""
        squares = [torch.zeros(features(layer)[0], device=layer.weight.device) for layer in layers]
        real = torch.zeros(0)

        def seeing(number: int) -> Any:
            def hook(module: nn.Module, args: tuple) -> None:
                states = args[0].reshape(-1, args[0].shape[-1]).float()
                squares[number] += states[real.to(states.device)].square().sum(0)

            return hook

        encoded = [subject.encode(example["prompt"])[: subject.max_prompt_tokens] for example in self.examples]
        with ExitStack() as hooks, attack_mode(subject.model):
            for number, layer in enumerate(layers):
                hook = layer.register_forward_pre_hook(seeing(number))
                hooks.callback(hook.remove)
            for start in range(0, len(encoded), subject.batch_size):
                rows = encoded[start : start + subject.batch_size]
                mask = subject.pad([[1] * len(row) for row in rows], "right", 0)
                real = mask.bool().flatten()
                batch = {"input_ids": subject.pad(rows, "right"), "attention_mask": mask}
                hidden_after(subject.model, batch, block)
        return [square.sqrt() for square in squares]


def _of_an_adapter(model: Any, parameter: nn.Parameter) -> bool:
    if not hasattr(model, "peft_config"):
        return False
    prefix = getattr(model.base_model, "prefix", "lora_")
    return any(prefix in name for name, other in model.named_parameters() if other is parameter)
