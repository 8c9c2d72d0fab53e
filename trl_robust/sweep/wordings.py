"""How every model of a grid answers questions in several wordings: in all of them, on average, in the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..attacks import AttackRow, Subject
from ..evaluation import judged, prompt_robustness
from ..evaluation.wordings import Case

WORST, AVERAGE, ORIGINAL = "worst-case accuracy", "average accuracy", "original wording"
"""Share of the questions answered rightly in all wordings; of all wordings; of the questions as they are."""

MEASURES = {WORST: "worst", AVERAGE: "average", ORIGINAL: "original"}
"""What is shown, and what [`~trl_robust.evaluation.prompt_robustness`] calls it."""


def answered(subject: Subject, cases: Sequence[Case], system_prompt: str | None = None) -> list[dict[str, Any]]:
    """
    Has a model answer every wording of every question, greedily, and judges the answers word for word.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        cases (sequence of [`~trl_robust.evaluation.wordings.Case`]):
            Questions with answers.
        system_prompt (`str`, *optional*):
            System message that the model was trained with.

    Returns:
        `list[dict]`: `case`, `wording` (0 is the original), and what [`~trl_robust.evaluation.judged`] gives.
    """
    places = [(case, number) for case in cases for number in range(len(case.wordings))]
    opening = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    rows = [
        AttackRow(
            f"{case.id}/{number}",
            [*opening, {"role": "user", "content": case.wordings[number]}] if opening else case.wordings[number],
            answer=case.answer,
        )
        for case, number in places
    ]
    found = judged(subject.answer(rows, "wordings"), "exact")
    return [{"case": case.id, "wording": number, **row} for (case, number), row in zip(places, found, strict=True)]


def matrix_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """
    Scores of every question over its wordings.

    Args:
        rows (sequence of `Mapping`):
            As [`answered`] gives them.

    Returns:
        `dict`: question -> scores, the original wording first; `None` where an answer was not scored.
    """
    found: dict[str, list[float | None]] = {}
    for row in rows:
        score = float(row["success"]) if row["status"] == "scored" else None
        found.setdefault(str(row["case"]), []).append(score)
    return found


def entry_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    What `results.json` says of a model's wordings.

    Args:
        rows (sequence of `Mapping`):
            As [`answered`] gives them.

    Returns:
        `dict`: what [`~trl_robust.evaluation.prompt_robustness`] gives.
    """
    return dict(prompt_robustness(list(matrix_of(rows).values()), scale=(0.0, 1.0)))


def scores_by_case(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """
    The measures of every question, for means and differences over seeds and questions.

    Args:
        rows (sequence of `Mapping`):
            As [`answered`] gives them.

    Returns:
        `dict`: name of a measure -> question -> score. A question whose original was not answered is in none.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for case, scores in matrix_of(rows).items():
        measured = prompt_robustness([scores], num_resamples=1)
        for name, key in MEASURES.items():
            value = measured[key]  # type: ignore[literal-required]
            if value is not None:
                found[name][case] = value
    return found
