from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .subject import AttackRow, Generation, Subject


@dataclass(frozen=True)
class Prefill:
    """The row's target put into the model's mouth as the start of its answer. Rows without a target are skipped."""

    name: ClassVar[str] = "prefill"
    attack_class: ClassVar[str] = "input"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = ""

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers that begin with the target; see [`Subject.answer`]."""
        return subject.answer(rows, "prefill", opening_of=lambda row: row.target or "", needs_target=True)
