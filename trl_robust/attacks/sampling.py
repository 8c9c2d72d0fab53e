"""Answers that are drawn instead of the likeliest ones, every row by its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, TopPLogitsWarper

if TYPE_CHECKING:
    from .subject import AttackRow


@dataclass(frozen=True)
class Sampling:
    """
    How answers are drawn.

    Args:
        temperature (`float`):
            Temperature; 0 for the likeliest answer.
        top_p (`float`):
            Share of the probability that the likeliest tokens keep.
        seed_of (`Callable`):
            Seed of a row's answer.
    """

    temperature: float
    top_p: float
    seed_of: Callable[[AttackRow], int]

    def noise(self, rows: Sequence[AttackRow]) -> LogitsProcessor:
        """What makes the likeliest token of a batch a drawn one."""
        return Noise([self.seed_of(row) for row in rows], self.temperature, self.top_p)


class Noise(LogitsProcessor):
    """
    Adds Gumbel noise to log-probabilities: the largest sum is a sample of the distribution.

    The sampling of `generate` draws for a whole batch at once, so that an answer would depend on what else is in the
    batch. Here every row has its own source of noise.

    Args:
        seeds (`Sequence[int]`):
            One a row.
        temperature (`float`):
            Temperature; without noise where it is 0.
        top_p (`float`):
            Share of the probability that is kept.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.temperature = temperature
        self.warper = TopPLogitsWarper(top_p) if top_p < 1 else None
        # On the CPU: the same numbers on every device.
        self.sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of shape `(B, V)` with noise."""
        if not self.temperature:
            return scores
        logits: Any = scores.float() / self.temperature
        if self.warper is not None:
            logits = self.warper(input_ids, logits)
        noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=it) for it in self.sources])
        return logits - noise.log().to(logits.device)
