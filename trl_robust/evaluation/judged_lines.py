"""The attacks of a generalised evaluation on one model, judged, and the load that latent attacks are divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attacks import Finetune, Generation, Pruning, Subject
from .curves import intact
from .generalized import ModelRun
from .lines import Line
from .load import LatentLoad, latent_load
from .suite import BROKEN, Judge, best_attempts, judged

Rows = list[dict[str, Any]]

HIDDEN = ("embedding", "latent")
"""Classes of attacks whose load is measured."""


@dataclass
class JudgedLine:
    """
    A line of one model, judged.

    Args:
        line ([`~trl_robust.evaluation.lines.Line`]):
            The line.
        generations (`list[list[Generation]]`):
            Answers at every point.
        verdicts (`list[list[Rows]]`):
            For every judge, the judged rows at every point.
        capability (`list[float | None]`):
            Capability of the attacked model at every point.
        untouched (`float`, *optional*):
            The same of the model that is not attacked.
        seconds (`float`, *optional*, defaults to `0.0`):
            How long the attack took.
        higher_is_better (`bool`, *optional*, defaults to `True`):
            Whether more capability is better: `False` for a perplexity.
        destroyed, unknown (`set[int]`):
            Points at which the model lost more than a tenth of its capability, and at which that is not known.
    """

    line: Line
    generations: list[list[Generation]]
    verdicts: list[list[Rows]]
    capability: list[float | None]
    untouched: float | None
    seconds: float = 0.0
    higher_is_better: bool = True
    destroyed: set[int] = field(default_factory=set, init=False)
    unknown: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.measures_capability:
            points = [(float(number), 0.0) for number in range(len(self.capability))]
            kept = intact(points, self.capability, self.untouched or 0.0, higher_is_better=self.higher_is_better)
            self.destroyed = {int(number) for number in kept.destroyed}
            self.unknown = {int(number) for number in kept.unknown}

    @property
    def measures_capability(self) -> bool:
        """Whether it is asked what the attack cost the model, and the model could do something before."""
        return self.line.tampers and bool(self.untouched)

    @property
    def intact(self) -> list[int]:
        """Points at which the model is known to be intact, where that is asked; all points otherwise."""
        return [number for number in range(len(self.line.points)) if number not in self.destroyed | self.unknown]

    def curve(self, judge: int = 0) -> list[tuple[float, Rows]]:
        """Budgets and judged rows, of lines with an axis."""
        rows = self.verdicts[judge]
        return [
            (point.budget, best_attempts(rows[number]))
            for number, point in enumerate(self.line.points)
            if point.budget is not None
        ]

    def pooled(self, judge: int = 0) -> Rows:
        """Judged rows of all intact points, what an attacker with the largest budget has tried, and all errors."""
        rows = self.verdicts[judge]
        found = [row for number in self.intact for row in rows[number]]
        return found + [row for number in sorted(self.unknown) for row in rows[number] if row["status"] == "errored"]


def judge_run(run: ModelRun, judges: Sequence[Judge]) -> list[JudgedLine]:
    """
    Judges everything that a model answered under attack.

    Args:
        run ([`~trl_robust.evaluation.generalized.ModelRun`]):
            The model's run, done.
        judges (sequence of judges):
            Names, or judges with a model; the first decides.

    Returns:
        `list` of [`JudgedLine`], one a line.
    """
    found = []
    by_answers = bool(run.suite.questions)
    for line in run.lines:
        asked = [run.asked(line, number) for number in range(len(line.points))]
        answers = [one.generations for one in asked]
        found.append(
            JudgedLine(
                line,
                answers,
                [[judged(part, judge) for part in answers] for judge in judges],
                [one.capability for one in asked],
                # What nobody asked is not unknown: without questions only weights attacks are read texts under.
                run.untouched if by_answers or isinstance(line.attack, Finetune | Pruning) else None,
                sum(one.seconds for one in asked),
                higher_is_better=by_answers,
            )
        )
    return found


def needs_load(line: Line) -> bool:
    """Whether a line's load is measured: an attack on hidden states whose budget is a relative radius."""
    relative = getattr(line.attack, "radius_unit", None) == "relative"
    own = line.load is not None or line.control_of is not None
    return line.attack.attack_class in HIDDEN and line.axis == "radius" and relative and not own


def broken_by_prompts(lines: Sequence[JudgedLine]) -> bool:
    """Whether any attack on prompts succeeded, so that there is a load to measure."""
    return any(
        row["status"] == "scored" and float(row["success"]) >= BROKEN
        for line in lines
        if line.line.attack.attack_class == "input" and line.line.control_of is None
        for part in line.verdicts[0]
        for row in part
    )


def measure_loads(subject: Subject, lines: Sequence[JudgedLine], *, seed: int = 0) -> dict[str, LatentLoad]:
    """
    How far the attacks on prompts that succeeded move this model's hidden states, at the sites of every latent attack.

    All prompts of the suite count that end in the request itself; dialogues (`many_shot`) and prefilled answers leave
    no single changed prompt to compare.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        lines (sequence of [`JudgedLine`]):
            Its judged lines.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, LatentLoad]`: by the name of the line.
    """
    answers: list[Generation] = []
    rows: Rows = []
    for judged_line in lines:
        attack = judged_line.line.attack
        if attack.attack_class == "input" and attack.name != "many_shot" and judged_line.line.control_of is None:
            answers += [one for part in judged_line.generations for one in part]
            rows += [row for part in judged_line.verdicts[0] for row in part]
    found = {}
    for judged_line in lines:
        line = judged_line.line
        if needs_load(line) and not line.name.startswith("map "):
            threat = line.attack.threat  # type: ignore[union-attr]
            only_embedding = set(threat.resolve_sites(subject.model)) == {"embedding"}
            tokens = "aligned" if only_embedding else "shared"
            found[line.name] = latent_load(subject, answers, rows, threat, tokens=tokens, seed=seed)  # type: ignore[arg-type]
    return found
