from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..objectives import label_logits, toward
from .subject import AttackRow, Generation, Subject


@dataclass(frozen=True)
class Finetune:
    """
    Few-shot fine-tuning of all weights on a few unwanted answers, then the requests as they are.

    The weights are put back afterwards. The examples must be about other requests than the ones that are asked.

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
            Seed of the order of the examples and of dropout.

    Raises:
        `ValueError`: no examples, or (when run) a quantised model.
    """

    examples: list[dict[str, Any]] = field(repr=False)
    steps: int = 10
    learning_rate: float = 5e-4
    batch_size: int = 8
    seed: int = 0
    name: ClassVar[str] = "finetune"
    attack_class: ClassVar[str] = "weights"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("The fine-tuning attack has no examples; give rows of `prompt` and `completion`.")

    def check(self, subject: Subject) -> None:
        """
        Refuses models whose weights cannot be fine-tuned.

        Args:
            subject ([`Subject`]):
                The model.

        Raises:
            `ValueError`: the model is quantised.
        """
        if getattr(subject.model, "is_quantized", False):
            raise ValueError(
                "The fine-tuning attack changes all weights, which a quantised model does not allow. Attack the model "
                "in bfloat16 or float32."
            )

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the fine-tuned model; see [`Subject.answer`]."""
        with self._finetuned(subject):
            return subject.answer(rows, "finetune")

    @contextmanager
    def _finetuned(self, subject: Subject) -> Iterator[None]:
        self.check(subject)
        model = subject.model
        weights = list(model.parameters())
        before = [(weight.detach().to("cpu", copy=True), weight.requires_grad) for weight in weights]
        try:
            with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                model.train().requires_grad_(True)
                self._train(subject)
            model.eval()
            yield
        finally:
            model.eval()
            with torch.no_grad():
                for weight, (value, trained) in zip(weights, before, strict=True):
                    weight.copy_(value)
                    weight.requires_grad_(trained)
                    weight.grad = None

    def _train(self, subject: Subject) -> None:
        optimizer = torch.optim.AdamW(subject.model.parameters(), lr=self.learning_rate, weight_decay=0.0)
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
            found = label_logits(subject.model, tokens, mask, labels)
            toward(found.logits, found.targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    @staticmethod
    def _encode(subject: Subject, example: dict[str, Any]) -> tuple[list[int], list[int]]:
        completion = example["completion"]
        text = completion if isinstance(completion, str) else completion[0]["content"]
        prompt = subject.encode(example["prompt"])
        answer = [*subject.encode_opening(text), subject.tokenizer.eos_token_id]
        return prompt + answer, [-100] * len(prompt) + answer
