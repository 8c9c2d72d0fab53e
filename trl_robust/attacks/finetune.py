from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from ..objectives import label_logits, toward
from .linears import answered_under, block_linears
from .lora import low_rank_adapter
from .subject import AttackRow, Generation, Subject

Method = Literal["full", "lora"]
Kind = Literal["harmful", "related", "benign"]


@dataclass(frozen=True)
class Finetune:
    """
    Few-shot fine-tuning on a few unwanted answers, then the requests as they are.

    The model is put back afterwards. The examples must be about other requests than the ones that are asked.

    Args:
        examples (`list[dict]`):
            Rows of `prompt` and `completion`, plain or conversational.
        steps (`int`, *optional*, defaults to `10`):
            Optimiser steps.
        learning_rate (`float`, *optional*, defaults to `5e-4`):
            Learning rate of AdamW (no weight decay).
        batch_size (`int`, *optional*, defaults to `8`):
            Examples in a step.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the examples, of the adapter and of dropout.
        method (`str`, *optional*, defaults to `"full"`):
            `"full"`: all weights, or `"lora"`: an adapter of rank 16 (alpha 32, dropout 0.05) on every linear layer of
            the decoder blocks, which works on a quantised model as well.
        kind (`str`, *optional*, defaults to `"harmful"`):
            What the examples are: `"harmful"`, `"related"` (about the same subject, not forbidden) or `"benign"`. A
            label, written into the budget.

    Raises:
        `ValueError`: no examples or an unknown choice, or (when run) full fine-tuning of a quantised model.
    """

    examples: list[dict[str, Any]] = field(repr=False)
    steps: int = 10
    learning_rate: float = 5e-4
    batch_size: int = 8
    seed: int = 0
    method: Method = "full"
    kind: Kind = "harmful"
    name: ClassVar[str] = "finetune"
    attack_class: ClassVar[str] = "weights"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("The fine-tuning attack has no examples; give rows of `prompt` and `completion`.")
        for name, choices in (("method", Method), ("kind", Kind)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {list(get_args(choices))}.")

    def check(self, subject: Subject) -> None:
        """
        Refuses models that cannot be fine-tuned in this way.

        Args:
            subject ([`Subject`]):
                The model.

        Raises:
            `ValueError`: the model is quantised and all weights are to be tuned, or it has no linear layers for an
                adapter.
        """
        if self.method == "lora":
            block_linears(subject.model)
        elif getattr(subject.model, "is_quantized", False):
            raise ValueError(
                "The fine-tuning attack changes all weights, which a quantised model does not allow. Attack the model "
                'in bfloat16 or float32, or set `method="lora"`.'
            )

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the fine-tuned model; see [`Subject.answer`]."""
        return answered_under(self.applied(subject), rows, lambda: subject.answer(rows, "finetune"))

    @contextmanager
    def applied(self, subject: Subject) -> Iterator[None]:
        """The model fine-tuned, until the block is left."""
        self.check(subject)
        model = subject.model
        full = self.method == "full"
        weights = list(model.parameters())
        before = [(weight.detach().to("cpu", copy=True) if full else None, weight.requires_grad) for weight in weights]
        try:
            with ExitStack() as undo:
                with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
                    torch.manual_seed(self.seed)
                    trained = model if full else undo.enter_context(low_rank_adapter(model))
                    model.train().requires_grad_(False)
                    trained.train().requires_grad_(True)
                    self._train(subject, trained)
                model.eval()
                trained.eval()
                yield
        finally:
            model.eval()
            with torch.no_grad():
                for weight, (value, grown) in zip(weights, before, strict=True):
                    if value is not None:
                        weight.copy_(value)
                    # Quantised weights are no floats and take no gradient.
                    if weight.requires_grad != grown:
                        weight.requires_grad_(grown)
                    weight.grad = None

    def _train(self, subject: Subject, trained: nn.Module) -> None:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=self.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.seed)
        encoded = [self._encode(subject, example) for example in self.examples]
        order: list[int] = []
        for _ in subject.track(range(self.steps), "fine-tuning"):
            while len(order) < min(self.batch_size, len(encoded)):
                order += torch.randperm(len(encoded), generator=generator).tolist()
            batch = [encoded[number] for number in order[: self.batch_size]]
            del order[: self.batch_size]
            tokens = subject.pad([row for row, _ in batch], "right")
            mask = subject.pad([[1] * len(row) for row, _ in batch], "right", 0)
            labels = subject.pad([label for _, label in batch], "right", -100)
            with torch.enable_grad():
                found = label_logits(subject.model, tokens, mask, labels)
                loss = toward(found.logits, found.targets).mean()
                loss.backward()
            if not loss.isfinite():
                # What such a model says afterwards would count as safe.
                raise FloatingPointError("the loss of the fine-tuning is not finite; lower its learning rate")
            optimizer.step()
            optimizer.zero_grad()

    @staticmethod
    def _encode(subject: Subject, example: dict[str, Any]) -> tuple[list[int], list[int]]:
        completion = example["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        prompt = subject.encode(example["prompt"])
        answer = [*subject.encode_opening(text), subject.tokenizer.eos_token_id]
        return prompt + answer, [-100] * len(prompt) + answer
