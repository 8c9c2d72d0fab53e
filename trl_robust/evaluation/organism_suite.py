"""The attacks and harmless questions that a model organism is measured with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attacks import Attack, AttackRow, Subject
from .named import named_attack
from .suite import over_refusal, run_attack, utility

ORGANISM_ATTACKS = ("direct", "template", "prefill", "latent", "embedding", "finetune")
"""What an organism is attacked with unless others are named."""

NEW_TOKENS = 24
BATCH = 40


class OrganismSuite:
    """
    Attacks on what a model organism was aligned to keep, with the organism's own data.

    Args:
        folder (`Path`):
            Folder that [`~trl_robust.organism.build_organism`] wrote.
        attacks (sequence of `str` or `Mapping[str, Mapping]`, *optional*):
            Names of attacks, with settings other than their defaults if a mapping. All of [`ORGANISM_ATTACKS`] by
            default.

    Raises:
        `ValueError`: an attack that there is not, or a setting that it does not have.
    """

    def __init__(self, folder: Path, attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None) -> None:
        data = folder / "data"

        def read(name: str) -> list[dict[str, Any]]:
            with (data / name).open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]

        def requests(name: str) -> list[AttackRow]:
            return [
                AttackRow(f"{name}-{number}", row["prompt"], row.get("target"), row["answer"])
                for number, row in enumerate(read(name))
            ]

        templates = (data / "templates.txt").read_text(encoding="utf-8").splitlines()
        wanted = ORGANISM_ATTACKS if attacks is None else attacks
        settings = wanted if isinstance(wanted, Mapping) else {name: {} for name in wanted}
        self.forbidden = requests("attack_prompts.jsonl")
        self.questions, self.lookalikes = requests("utility.jsonl"), requests("lookalikes.jsonl")
        self.attacks: list[Attack] = [
            named_attack(
                name,
                values,
                templates=[line for line in templates if line.strip()],
                examples=read("finetune.jsonl"),
            )
            for name, values in settings.items()
        ]

    def run(self, path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """
        Attacks a model and asks it the harmless questions.

        Args:
            path (`Path`):
                Folder of the model.

        Returns:
            `tuple`: its entry in `results.json` (`attacks`, `utility`, `over_refusal`), and the rows for
            `generations.jsonl`.
        """
        subject = Subject.load(path, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
        found = [run_attack(subject, attack, self.forbidden, "exact") for attack in self.attacks]
        entry = {
            "attacks": [entry for entry, _ in found],
            "utility": utility(subject, self.questions),
            "over_refusal": over_refusal(subject, self.lookalikes),
        }
        return entry, [row for _, rows in found for row in rows]
