from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from .request import chance
from .subject import AttackRow, Generation, Subject
from .suffix import ordinary_tokens, random_words


@dataclass(frozen=True)
class Prefill:
    """
    The row's target put into the model's mouth as the start of its answer. Rows without a target are skipped.

    Args:
        objective (`str`, *optional*, defaults to `"target"`):
            `"target"`, or `"random"`: as many random words of the tokenizer as the target has, the control.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the control.
    """

    objective: Literal["target", "random"] = "target"
    seed: int = 0
    name: ClassVar[str] = "prefill"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = ""

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers that begin with the target; see [`Subject.answer`]."""
        tokens = ordinary_tokens(subject) if self.objective == "random" else []

        def opening(row: AttackRow) -> str:
            target = row.target or ""
            return random_words(subject, len(target.split()), chance(self.seed, row), tokens) if tokens else target

        return subject.answer(rows, "prefill", opening_of=opening, needs_target=True)
