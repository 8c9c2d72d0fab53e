from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .subject import AttackRow, Generation, Subject


@dataclass(frozen=True)
class Direct:
    """No attack: the request as it is. What every attack has to beat."""

    name: ClassVar[str] = "direct"
    attack_class: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    budget_axis: ClassVar[str] = ""

    def run(self, subject: Subject, rows: Sequence[AttackRow]) -> list[Generation]:
        """Answers of the model to the requests; see [`Subject.answer`]."""
        return subject.answer(rows, "direct")
