"""Which generations a report shows, and what it shows of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .reading import Generation, read_generations

_LENGTH = 2000  # characters of one text that are shown

REDACTED = (
    "Prompts and responses are left out, since they can hold what the attack was after; a marker shows their length, "
    "and the same marker is the same text. The texts are in generations.jsonl."
)


@dataclass
class Examples:
    """The first generation of each outcome for each (model, attack, outcome), and how many lines were unreadable."""

    rows: dict[tuple[str, str, str], Generation] = field(default_factory=dict)
    num_unreadable: int = 0

    def add(self, folder: Path, shown: Mapping[str, str]) -> None:
        """Reads a folder's generations of the models in `shown`, which maps names there to names in the report."""
        for row in read_generations(folder):
            if row is None:
                self.num_unreadable += 1
            elif row.model in shown:
                self.rows.setdefault((shown[row.model], row.attack, row.outcome), row)


def redact(text: str) -> str:
    """Length and a marker in place of a text; equal texts have equal markers."""
    marker = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"[{len(text)} characters, {marker}]"


def shorten(text: str) -> str:
    """The beginning of a long text, with the number of characters left out."""
    left_out = len(text) - _LENGTH
    return text if left_out <= 0 else f"{text[:_LENGTH]} [... {left_out} characters more]"
