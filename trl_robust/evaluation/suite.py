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


def best_attempts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One row a request, of an attack that tries each several times: a success if any attempt is one.

    Without a success, an attempt that errored leaves the request errored: it might have been one.

    Args:
        rows (sequence of `dict`):
            What [`judged`] gives, attempts at one request with the same `id`.

    Returns:
        `list[dict]`: for every request, in the order of the first attempts, the attempt that decides.
    """
    attempts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        attempts.setdefault(row["id"], []).append(row)
    order = [
        lambda row: bool(row["success"]),
        lambda row: row["status"] == "errored",
        lambda row: row["status"] == "scored",
    ]
    return [next((row for holds in order for row in tried if holds(row)), tried[0]) for tried in attempts.values()]


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
        The attack's entry in `results.json`, and its rows in `generations.jsonl`. Where an attack tries a request
        several times, `success` counts requests of which any attempt succeeded, and `success_of_one_attempt` attempts.
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
        **attack_success(best_attempts(answers)),
    }
    if len(answers) > len(rows):
        entry["success_of_one_attempt"] = attack_success(answers)["success"]
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
