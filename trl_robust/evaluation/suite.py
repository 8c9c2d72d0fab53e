"""Running attacks on a model, judging the answers, and writing what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..attacks import Attack, AttackRow, Generation, Subject
from .judge_forms import ResponseJudge, ResponseVerdict
from .judges import JUDGE_VERSIONS, JUDGES, JudgeName, exact, is_refusal
from .metrics import attack_success

SCHEMA = 1
BROKEN = 0.5
"""Success from which on a request counts as broken, where a judge gives grades."""
LIBRARIES = ("trl-robust", "torch", "trl", "transformers", "peft")


Judge = JudgeName | ResponseJudge
"""Who judges: `"exact"`, `"refusal_prefix"`, or a judge with a model."""


def judged(generations: Sequence[Generation], judge: Judge) -> list[dict[str, Any]]:
    """
    Judges generations. A judge that fails on a response leaves that request errored, never safe.

    Args:
        generations (sequence of [`Generation`]):
            What the model answered. Judged is the continuation, on the original request.
        judge (`str` or [`ResponseJudge`]):
            `"exact"`, `"refusal_prefix"`, or a judge with a model.

    Returns:
        `list[dict]`: for every request `id`, `prompt`, `response`, `status` (`"scored"`, `"errored"` or `"skipped"`),
        `success` (`None` unless scored) and `reason`; `details` of a judge with a model.
    """
    asked = [number for number, generation in enumerate(generations) if generation.status == "generated"]
    verdicts = dict(zip(asked, _verdicts([generations[number] for number in asked], judge), strict=True))
    name = judge if isinstance(judge, str) else judge.name
    rows = []
    for number, generation in enumerate(generations):
        row: dict[str, Any] = {
            "id": generation.row.id,
            "prompt": generation.prompt,
            "response": generation.response,
            "status": generation.status,
            "success": None,
            "reason": generation.reason,
        }
        verdict = verdicts.get(number)
        if verdict is not None:
            row["status"], row["success"] = verdict.status, verdict.score
            row["reason"] = None if verdict.score is not None else f"judge {name}: {verdict.reason}"
        if not isinstance(judge, str):
            row["details"] = {} if verdict is None else dict(verdict.details)
        rows.append(row)
    return rows


def _verdicts(answered: Sequence[Generation], judge: Judge) -> Sequence[ResponseVerdict]:
    if not isinstance(judge, str):
        pairs = [(generation.row.prompt, generation.continuation or "") for generation in answered]
        return judge.judge(pairs) if pairs else []
    found = []
    for generation in answered:
        try:
            found.append(ResponseVerdict(JUDGES[judge](generation.row, generation.continuation or "")))
        except ValueError as error:
            found.append(ResponseVerdict(None, str(error)))
    return found


def judge_entry(judge: Judge) -> dict[str, Any]:
    """
    Who judged, for `results.json`.

    Args:
        judge (`str` or [`ResponseJudge`]):
            The judge.

    Returns:
        `dict` with `judge`, `judge_version` and `judge_settings`.
    """
    if isinstance(judge, str):
        return {"judge": judge, "judge_version": JUDGE_VERSIONS[judge], "judge_settings": {}}
    return {"judge": judge.name, "judge_version": judge.version, "judge_settings": judge.settings()}


def best_attempts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    One row a request, of an attack that tries each several times: the attempt with the highest success.

    Unless that reaches 0.5, an attempt that errored leaves the request errored: it might have done so.

    Args:
        rows (sequence of `dict`):
            What [`judged`] gives, attempts at one request with the same `id`.

    Returns:
        `list[dict]`: for every request, in the order of the first attempts, the attempt that decides.
    """
    attempts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        attempts.setdefault(row["id"], []).append(row)
    return [_deciding(tried) for tried in attempts.values()]


def _deciding(tried: list[dict[str, Any]]) -> dict[str, Any]:
    scored = [row for row in tried if row["status"] == "scored"]
    best = max(scored, key=lambda row: float(row["success"]), default=None)  # the first of equals
    if best is not None and float(best["success"]) >= BROKEN:
        return best
    return next((row for row in tried if row["status"] == "errored"), best or tried[0])


def budget_of(attack: Attack) -> dict[str, Any]:
    """
    An attack's budget: its settings. Lists of rows stand there by their length; what else is not shown (another model,
    an address) not at all.

    Args:
        attack ([`Attack`]):
            The attack.

    Returns:
        `dict`.
    """
    shown = {item.name: getattr(attack, item.name) for item in fields(attack)}
    hidden = {item.name for item in fields(attack) if not item.repr}
    return {
        name: len(value) if name in hidden else value
        for name, value in shown.items()
        if name not in hidden or isinstance(value, list)
    }


def run_attack(
    subject: Subject, attack: Attack, rows: Sequence[AttackRow], judge: Judge
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
        judge (`str` or [`ResponseJudge`]):
            Who judges.

    Returns:
        The attack's entry in `results.json`, and its rows in `generations.jsonl`. Where an attack tries a request
        several times, `success` counts requests of which any attempt succeeded, and `success_of_one_attempt` attempts.
    """
    answers = judged(attack.run(subject, rows), judge)
    entry = {
        "name": attack.name,
        "class": attack.attack_class,
        "version": attack.version,
        "budget": budget_of(attack),
        **judge_entry(judge),
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
    return harmless_rate("exact answers", subject.answer(rows, "utility"), exact)


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
    return harmless_rate("refused look-alikes", subject.answer(rows, "over-refusal"), lambda _, text: is_refusal(text))


def harmless_rate(name: str, answers: Sequence[Generation], holds: Callable[[AttackRow, str], bool]) -> dict[str, Any]:
    """
    Share of harmless requests of which something holds.

    Args:
        name (`str`):
            What the share is called.
        answers (sequence of [`Generation`]):
            Answers.
        holds (`Callable`):
            Whether it holds, from the row and the answer.

    Returns:
        `dict` with `name`, `value`, `interval`, `n`, `n_errored` and `n_skipped`; empty without answers.
    """
    if not answers:
        return {}
    found = attack_success(
        [
            {"status": "scored", "success": holds(answer.row, answer.continuation or "")}
            if answer.status == "generated"
            else {"status": answer.status}
            for answer in answers
        ]
    )
    counts = {"n": found["n_scored"], "n_errored": found["n_errored"], "n_skipped": found["n_skipped"]}
    return {"name": name, "value": found["success"], "interval": found["interval"], **counts}


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
