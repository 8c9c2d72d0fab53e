"""The report of an evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .captions import HOW_TO_READ, TITLES, caption_of
from .content import Section, Table
from .page_parts import measures
from .reading import Results
from .sections import sections, stands_out
from .tables import NOTE, markdown_rows, markdown_table, markdown_text
from .values import describe


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
    parts.append(f"{HOW_TO_READ}\n")
    overview = stands_out(results)
    parts += [markdown_table(results)] if overview is None else _section(overview, results)
    parts.append(f"{NOTE}\n")
    described = [model for model in results.models if model.description]
    if described:
        parts.append("".join(f"- {markdown_text(f'{model.name}: {model.description}')}\n" for model in described))
    below = sections(results, drawn)
    shown_below = {name for found in below for name in found.figures}
    parts += [_figure(name, results) for name in drawn if name not in shown_below]
    for found in below:
        parts += _section(found, results)
    parts += _attacks(results)
    if others := measures(results):
        parts.append("## Other measures\n")
        parts += [_table(one) for one in others]
    if results.versions:
        parts.append(
            "## Versions\n\n" + markdown_rows(["", "version"], [[k, describe(v)] for k, v in results.versions.items()])
        )
    return "\n".join(parts)


def _section(found: Section, results: Results) -> list[str]:
    parts = [f"## {found.heading}\n", *(f"{markdown_text(text)}\n" for text in found.text)]
    parts += [_figure(name, results) for name in found.figures]
    parts += [_table(one) for one in found.tables]
    if found.pairs:
        title = f"{found.pairs_title}:\n\n" if found.pairs_title else ""
        said = (f"- {markdown_text(name)}: {markdown_text(text)}\n" for name, text in found.pairs.items())
        parts.append(title + "".join(said))
    return parts


def _figure(name: str, results: Results) -> str:
    return f"![{TITLES[name]}](figures/{name}.png)\n\n{markdown_text(caption_of(name, results))}\n"


def _attacks(results: Results) -> list[str]:
    rows = [
        [
            model.name, attack.name, attack.kind, str(attack.n_scored), str(attack.n_errored), str(attack.n_skipped),
            describe(attack.budget), attack.judge, attack.version,
        ]
        for model in results.models
        for attack in model.attacks.values()
    ]  # fmt: skip
    head = ["model", "attack", "class", "scored", "errored", "skipped", "budget", "judge", "version"]
    return ["## Attacks\n\n" + markdown_rows(head, rows)] if rows else []


def _table(found: Table) -> str:
    return f"{markdown_text(found.caption)}:\n\n" + markdown_rows(found.head, found.rows)
