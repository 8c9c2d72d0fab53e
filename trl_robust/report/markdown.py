"""The report of an evaluation as Markdown, and the part of it that belongs into a model card."""

from __future__ import annotations

from collections.abc import Sequence

from .captions import HOW_TO_READ, TITLES, caption_of
from .curve_figures import CLASSES, worst_of_class
from .reading import Results
from .sections import Table, safety, sections
from .tables import NOTE, attack_cell, markdown_rows, markdown_table, markdown_text, measure_cell
from .values import describe

CARD_NOTE = (
    "Attack success is the share of requests on which an attack got what it was after; lower is safer, and only where "
    "the model is still of use. Withstanding these attacks is not withstanding others."
)


def markdown_page(results: Results, drawn: Sequence[str]) -> str:
    """
    The report.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.
        drawn (sequence of `str`):
            Names of the figures that were drawn.

    Returns:
        `str`.
    """
    parts = ["# Attack report\n"]
    if results.created:
        parts.append(f"Evaluated {markdown_text(results.created)}.\n")
    parts += [f"{HOW_TO_READ}\n", markdown_table(results), f"{NOTE}\n"]
    described = [model for model in results.models if model.description]
    if described:
        parts.append("".join(f"- {markdown_text(f'{model.name}: {model.description}')}\n" for model in described))
    for name in drawn:
        parts.append(f"![{TITLES[name]}](figures/{name}.png)\n\n{markdown_text(caption_of(name, results))}\n")
    for found in sections(results):
        parts.append(f"## {found.heading}\n")
        parts += [f"{markdown_text(text)}\n" for text in found.text]
        parts += [_table(one) for one in found.tables]
    rows = [
        [
            model.name, attack.name, attack.kind, str(attack.n_scored), str(attack.n_errored), str(attack.n_skipped),
            describe(attack.budget), attack.judge, attack.version,
        ]
        for model in results.models
        for attack in model.attacks.values()
    ]  # fmt: skip
    head = ["model", "attack", "class", "scored", "errored", "skipped", "budget", "judge", "version"]
    if rows:
        parts.append("## Attacks\n\n" + markdown_rows(head, rows))
    if results.versions:
        parts.append(
            "## Versions\n\n" + markdown_rows(["", "version"], [[k, describe(v)] for k, v in results.versions.items()])
        )
    return "\n".join(parts)


def card(results: Results) -> str:
    """
    A section for a model card: what the models withstand, at which budgets, and what that does not say.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `str`: Markdown, headings from the second level on.
    """
    parts = ["## Robustness\n", f"{CARD_NOTE}\n"]
    for model in results.models:
        rows = []
        for kind, changed in {"none": "plain requests", **CLASSES}.items():
            if (worst := worst_of_class(model, kind)) is not None:
                values = " ".join(attack_cell(worst))
                rows.append([changed, worst.name, values, str(worst.n_scored), describe(worst.budget), worst.judge])
        if not rows:
            continue
        parts.append(f"### {markdown_text(model.name)}\n")
        head = ["attack on", "strongest", "success", "n", "budget", "judge"]
        parts.append(markdown_rows(head, rows))
        useful = [
            f"{measure.name} {' '.join(measure_cell(measure))}"
            for measure in (model.utility, model.over_refusal)
            if measure is not None
        ]
        if useful:
            parts.append(f"Beside it: {markdown_text('; '.join(useful))}.\n")
        parts += [f"**Mind: {markdown_text(warning)}.**\n" for warning in model.warnings]
    if (found := safety(results)) is not None:
        parts += ["### Factor of safety\n", f"{markdown_text(found.text[0])}\n"]
        parts += [_table(one) for one in found.tables if not one.folded]
    versions = {str(results.suite.get("name")): results.suite.get("version")} if results.suite.get("name") else {}
    shown = ", ".join(f"{name} {describe(version)}" for name, version in {**versions, **results.versions}.items())
    if shown:
        parts.append(f"Measured with {markdown_text(shown)}.\n")
    return "\n".join(parts)


def _table(found: Table) -> str:
    return f"{markdown_text(found.caption)}:\n\n" + markdown_rows(found.head, found.rows)
