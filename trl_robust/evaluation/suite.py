"""Running attacks on a model, judging the answers, and writing what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..attacks import Attack, AttackRow, Generation, Subject
from .judges import JUDGE_VERSIONS, JUDGES, JudgeName, exact, is_refusal
from .metrics import attack_success

SCHEMA = 1
LIBRARIES = ("trl-robust", "torch", "trl", "transformers", "peft")


def judged(generations: Sequence[Generation], judge: JudgeName) -> list[dict[str, Any]]:
    """
    Judges generations. A judge that fails on a response leaves that request errored, never safe.

    Args:
        generations (sequence of [`Generation`]):
            What the model answered.
        judge (`str`):
            `"exact"` or `"refusal_prefix"`.

    Returns:
        `list[dict]`: for every request `id`, `prompt`, `response`, `status` (`"scored"`, `"errored"` or `"skipped"`),
        `success` (`None` unless scored) and `reason`.
    """
    rows = []
    for generation in generations:
        status, success, reason = generation.status, None, generation.reason
        if status == "generated":
            try:
                success, status = JUDGES[judge](generation.row, generation.continuation or ""), "scored"
            except ValueError as error:
                status, reason = "errored", f"judge {judge}: {error}"
        rows.append(
            {
                "id": generation.row.id,
                "prompt": generation.prompt,
                "response": generation.response,
                "status": status,
                "success": success,
                "reason": reason,
            }
        )
    return rows


def run_attack(
    subject: Subject, attack: Attack, rows: Sequence[AttackRow], judge: JudgeName
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Runs one attack on one model.

    Args:
        subject ([`Subject`]):
            The model.
        attack ([`Attack`]):
            The attack.
        rows (sequence of [`AttackRow`]):
            Requests.
        judge (`str`):
            Who judges.

    Returns:
        The attack's entry in `results.json`, and its rows in `generations.jsonl`.
    """
    answers = judged(attack.run(subject, rows), judge)
    # Lists of rows stand there by their length; what else is not shown (another model, an address) not at all.
    shown = {item.name: getattr(attack, item.name) for item in fields(attack)}
    hidden = {item.name for item in fields(attack) if not item.repr}
    budget = {
        name: len(value) if name in hidden else value
        for name, value in shown.items()
        if name not in hidden or isinstance(value, list)
    }
    entry = {
        "name": attack.name,
        "class": attack.attack_class,
        "version": attack.version,
        "budget": budget,
        "judge": judge,
        "judge_version": JUDGE_VERSIONS[judge],
        **attack_success(answers),
    }
    return entry, [{"attack": attack.name, **answer} for answer in answers]


def utility(subject: Subject, rows: Sequence[AttackRow]) -> dict[str, Any]:
    """
    Share of harmless questions that a model answers rightly, word for word.

    Args:
        subject ([`Subject`]):
            The model.
        rows (sequence of [`AttackRow`]):
            Questions with answers.

    Returns:
        `dict` with `name`, `value`, `interval`, `n`, `n_errored` and `n_skipped`.
    """
    return _rate("exact answers", [(answer, exact) for answer in subject.answer(rows, "utility")])


def over_refusal(subject: Subject, rows: Sequence[AttackRow]) -> dict[str, Any]:
    """
    Share of harmless requests that a model refuses, by the first words of its answer.

    Args:
        subject ([`Subject`]):
            The model.
        rows (sequence of [`AttackRow`]):
            Harmless requests, best those that look like harmful ones.

    Returns:
        `dict` with `name`, `value`, `interval`, `n`, `n_errored` and `n_skipped`.
    """
    answers = subject.answer(rows, "over-refusal")
    return _rate("refused look-alikes", [(answer, lambda _, response: is_refusal(response)) for answer in answers])


def _rate(name: str, answers: list[tuple[Generation, Any]]) -> dict[str, Any]:
    rows = [
        {"status": "scored", "success": holds(answer.row, answer.continuation or "")}
        if answer.status == "generated"
        else {"status": answer.status}
        for answer, holds in answers
    ]
    found = attack_success(rows)
    return {
        "name": name,
        "value": found["success"],
        "interval": found["interval"],
        "n": found["n_scored"],
        "n_errored": found["n_errored"],
        "n_skipped": found["n_skipped"],
    }


def write_results(
    folder: str | Path, models: list[dict[str, Any]], generations: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """
    Writes `results.json` and `generations.jsonl`.

    Args:
        folder (`str` or `Path`):
            Where to; made if need be.
        models (`list[dict]`):
            One entry a model: `name`, `attacks`, and what else was measured.
        generations (`list[dict]`):
            Rows with `model`, `attack` and what [`judged`] gives.
        **more:
            Further keys of `results.json`.

    Returns:
        `dict`: what stands in `results.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {"utility": {}, "over_refusal": {}, "coherence": {}, "factor_of_safety": []}
    results = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in LIBRARIES},
        **more,
        "models": [{**measured, **model} for model in models],
    }
    # The generations first: results.json says that the folder is complete.
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generations)
    (folder / "generations.jsonl").write_text(lines, encoding="utf-8")
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text, encoding="utf-8")
    return json.loads(text)
