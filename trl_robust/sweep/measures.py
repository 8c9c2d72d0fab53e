"""How every model of a grid is measured: attacks, harmless questions, wordings, benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..attacks import Attack, AttackRow, Subject
from ..data import DataError, as_prompt_completion, load_rows
from ..evaluation import attack_success, judged, run_attack
from ..evaluation.lm_eval import accuracies, check_installed
from ..evaluation.named import named_attack
from ..evaluation.organism_suite import OrganismSuite
from ..evaluation.wordings import Case
from .evaluate_keys import Evaluation, RowsKeys
from .wordings import answered, entry_of

UTILITY, COMPLIANCE = "utility", "compliance"
"""Names of the two sets of harmless questions in `harmless.jsonl`."""


def check_evaluation(evaluation: Evaluation) -> None:
    """
    Stops before anything is trained if what measures is not there.

    Args:
        evaluation ([`Evaluation`]):
            How models are measured.

    Raises:
        [`~trl_robust.data.DataError`]: a dataset cannot be loaded.
        [`~trl_robust.evaluation.lm_eval.MissingLmEvalError`]: lm-eval is not installed.
    """
    if evaluation.lm_eval is not None:
        check_installed()
    for part in (evaluation.requests, evaluation.compliance, evaluation.utility):
        if part is not None:
            part.load("row")
    if evaluation.wordings is not None:
        evaluation.wordings.load()
    if evaluation.finetune is not None:
        _examples(evaluation.finetune)


@dataclass(frozen=True)
class Suite:
    """What a model is asked: attacks with their requests, look-alikes, questions, and wordings."""

    attacks: Sequence[Attack]
    requests: Sequence[AttackRow]
    lookalikes: Sequence[AttackRow]
    questions: Sequence[AttackRow]
    cases: Sequence[Case] = ()
    system_prompt: str | None = None


def suite_of(evaluation: Evaluation, organism: Path | None, system_prompt: str | None = None) -> Suite:
    """
    Loads the data that models are measured with.

    Args:
        evaluation ([`Evaluation`]):
            How models are measured.
        organism (`Path`, *optional*):
            The organism's folder.
        system_prompt (`str`, *optional*):
            System message that the model was trained with.

    Returns:
        [`Suite`].

    Raises:
        [`~trl_robust.data.DataError`]: a dataset cannot be loaded.
    """
    data = organism / "data" if organism is not None else None
    cases = evaluation.wordings.load(data) if evaluation.wordings else []
    if organism is not None and data is not None:
        own = OrganismSuite(organism, evaluation.attacks)
        # Look-alikes tell what a defence against attacks costs; of other trainings its own questions may ask for what
        # was to change.
        questions = own.questions if evaluation.attacks else []
        if evaluation.utility is not None:
            file = data / Path(evaluation.utility.path).name
            questions = replace(evaluation.utility, path=str(file)).load(UTILITY, system_prompt)
        lookalikes = own.lookalikes if evaluation.attacks else []
        return Suite(own.attacks, own.forbidden, lookalikes, questions, cases, system_prompt)
    lines = Path(evaluation.templates).read_text(encoding="utf-8").splitlines() if evaluation.templates else None
    templates = None if lines is None else [line for line in lines if line.strip()]
    examples = _examples(evaluation.finetune) if evaluation.finetune else []
    attacks = [
        named_attack(name, settings, templates=templates, examples=examples)
        for name, settings in evaluation.attacks.items()
    ]
    sets = (("request", evaluation.requests), (COMPLIANCE, evaluation.compliance), (UTILITY, evaluation.utility))
    requests, lookalikes, questions = (part.load(name, system_prompt) if part else [] for name, part in sets)
    return Suite(attacks, requests, lookalikes, questions, cases, system_prompt)


def _examples(source: RowsKeys) -> list[dict[str, Any]]:
    rows = as_prompt_completion(load_rows(source.path, config=source.config, split=source.split), "fine-tuning")
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise DataError(f"{source.path} has {rows.column_names}; `prompt` and `completion` are needed.")
    return list(rows)[: source.max_rows]


@dataclass
class Measured:
    """
    What came out for one model.

    Args:
        entry (`dict`):
            Its entry in `results.json`.
        generations (`list[dict]`):
            Rows of the attacks.
        harmless (`list[dict]`):
            Rows of the harmless questions: `set`, `id`, `prompt`, `response`, `status`, `success` (answered rightly,
            or not refused).
        wordings (`list[dict]`):
            Rows of the questions in several wordings, as [`~trl_robust.sweep.wordings.answered`] gives them.
    """

    entry: dict[str, Any]
    generations: list[dict[str, Any]]
    harmless: list[dict[str, Any]]
    wordings: list[dict[str, Any]] = field(default_factory=list)


def measure(subject: Subject, suite: Suite, evaluation: Evaluation) -> Measured:
    """
    Measures a model.

    Args:
        subject ([`~trl_robust.attacks.Subject`]):
            The model.
        suite ([`Suite`]):
            What it is asked.
        evaluation ([`Evaluation`]):
            Who judges, and benchmarks.

    Returns:
        [`Measured`].
    """
    found = [run_attack(subject, attack, suite.requests, evaluation.judge) for attack in suite.attacks]
    entry: dict[str, Any] = {"attacks": [attack for attack, _ in found]}
    harmless = []
    if suite.questions:
        rows = judged(subject.answer(suite.questions, UTILITY), "exact")
        entry["utility"] = _rate("exact answers", rows)
        harmless += [{"set": UTILITY, **row} for row in rows]
    if suite.lookalikes:
        rows = judged(subject.answer(suite.lookalikes, COMPLIANCE), "refusal_prefix")
        refused = [{**row, "success": not row["success"]} if row["status"] == "scored" else row for row in rows]
        entry["over_refusal"] = _rate("refused look-alikes", refused)
        harmless += [{"set": COMPLIANCE, **row} for row in rows]
    wordings = answered(subject, suite.cases, suite.system_prompt) if suite.cases else []
    if wordings:
        entry["wordings"] = entry_of(wordings)
    if evaluation.lm_eval is not None:
        options = evaluation.lm_eval
        entry["benchmarks"] = accuracies(
            subject,
            options.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_folder=options.task_folder,
        )
        if not suite.questions:
            values = [task["value"] for task in entry["benchmarks"].values()]
            entry["utility"] = {"name": f"accuracy on {', '.join(options.tasks)}", "value": sum(values) / len(values)}
    return Measured(entry, [row for _, rows in found for row in rows], harmless, wordings)


def _rate(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = attack_success(rows)
    return {
        "name": name,
        "value": found["success"],
        "interval": found["interval"],
        "n": found["n_scored"],
        "n_errored": found["n_errored"],
        "n_skipped": found["n_skipped"],
    }
