from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal, get_args

from .request import chance
from .subject import AttackRow, Generation, Subject
from .suffix import ordinary_tokens, written

TRIES = 20
"""How many draws are made in search of one that has the target's number of tokens when it is encoded again."""

PrefillObjective = Literal["target", "random"]


@dataclass(frozen=True)
class Prefill:
    """
    The row's target put into the model's mouth as the start of its answer. Rows without a target are skipped.

    Args:
        objective (`str`, *optional*, defaults to `"target"`):
            `"target"`, or `"random"`: as many random ordinary tokens of the tokenizer as the target has, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.

    Raises:
        `ValueError`: an unknown objective.
    """

    objective: PrefillObjective = "target"
    seed: int = 0
    name: ClassVar[str] = "prefill"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.objective not in get_args(PrefillObjective):
            raise ValueError(f"objective={self.objective!r} is not one of {list(get_args(PrefillObjective))}.")

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers that begin with the target; see [`Subject.answer`]."""
        tokens = ordinary_tokens(subject) if self.objective == "random" else []

        def opening(row: AttackRow) -> str:
            target = row.target or ""
            return _random_opening(subject, target, chance(self.seed, row), tokens) if tokens else target

        return subject.answer(rows, "prefill", opening_of=opening, needs_target=True)


def _random_opening(subject: Subject, target: str, draw: Random, tokens: Sequence[int]) -> str:
    """Text of as many random tokens as the target has; tokens that are written as text may merge, hence the tries."""
    count = len(subject.encode_opening(target))
    drawn = [written(subject, draw.choices(tokens, k=count)).strip() for _ in range(TRIES)]
    return min(drawn, key=lambda text: abs(len(subject.encode_opening(text)) - count))
