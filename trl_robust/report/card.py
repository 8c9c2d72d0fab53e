"""The section "Robustness" of a model card."""

from __future__ import annotations

from pathlib import Path

from .content import Table
from .curve_figures import CLASSES, worst_of_class
from .reading import AttackResult, ModelResult, Results, read_results
from .safety import cap_of, resistance_cell
from .tables import NOTE, attack_cell, markdown_rows, markdown_text, measure_cell
from .values import describe, mapping_of

FILE = "model_card.md"
MOST_CHARACTERS = 60

READ = (
    "Attack success is the share of requests on which an attack got what it was after, with its 95 % bootstrap "
    "interval over requests; lower is safer. Shown is the attack of every kind that succeeds most often, at the best "
    f"budget that leaves the model intact. {NOTE}"
)
SAFETY = (
    "The smallest budget with which an attack breaks the largest share asked for (> where no budget that was tried "
    "did), and how many times the load that is."
)
NOT_CLAIMED = (
    "Withstanding these attacks is not withstanding others, larger budgets, or people who adapt to the model. The "
    "judge can err. A factor of safety is no more than its load: another use has another one. A factor above 1 on "
    "hidden states or weights says nothing of attacks on prompts unless both were seen to go together."
)


def write_card_section(folder: str | Path) -> Path:
    """
    Writes `model_card.md`, a section to paste into a model card, into the folder of an evaluation.

    Args:
        folder (`str` or `Path`):
            Folder with `results.json`.

    Returns:
        `Path` of the file.

    Raises:
        `FileNotFoundError`: there is no `results.json`.
        `ValueError`: it has a newer schema or holds a value that cannot be reported.
    """
    return write_card(Path(folder), read_results(folder))


def write_card(folder: Path, results: Results) -> Path:
    """
    Writes `model_card.md` from results that are read already.

    Args:
        folder (`Path`):
            Where to.
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `Path` of the file.
    """
    path = folder / FILE
    path.write_text(card(results), encoding="utf-8")
    return path


def card(results: Results) -> str:
    """
    What the models withstand, at which budgets, and what that does not say; with several models a part for each.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `str`: Markdown, headings from the second level on.
    """
    parts = ["## Robustness\n", f"{READ}\n"]
    for model in results.models:
        if len(results.models) > 1:
            parts.append(f"### {markdown_text(model.name)}\n")
        parts += _of_model(model)
    shown = ", ".join(f"{name} {describe(version)}" for name, version in results.versions.items())
    measured = f"Measured {results.created} with {shown}." if results.created else f"Measured with {shown}."
    parts.append(f"**Not claimed.** {NOT_CLAIMED}\n")
    if shown:
        parts.append(f"{markdown_text(measured)}\n")
    return "\n".join(parts)


def _of_model(model: ModelResult) -> list[str]:
    rows = []
    for kind, changed in {"none": "nothing (plain requests)", **CLASSES}.items():
        if (worst := worst_of_class(model, kind)) is not None:
            success = " ".join(attack_cell(worst))
            name = f"{worst.name} v{worst.version}" if worst.version else worst.name
            rows.append([changed, name, success, str(worst.n_scored), _budget(worst), worst.judge or "-"])
    if not rows:
        return ["Not attacked.\n"]
    parts = [markdown_rows(["attack on", "strongest", "success", "n", "budget", "judge"], rows)]
    useful = [
        f"{what} ({measure.name}) {' '.join(measure_cell(measure))}"
        for what, measure in (("Utility", model.utility), ("over-refusal", model.over_refusal))
        if measure is not None
    ]
    if useful:
        parts.append(f"{markdown_text('; '.join(useful))}.\n")
    parts += [f"**Mind: {markdown_text(warning)}.**\n" for warning in model.warnings]
    if (safety := _safety(model)) is not None:
        parts += [f"{SAFETY}\n", markdown_rows(safety.head, safety.rows)]
    return parts


def _safety(model: ModelResult) -> Table | None:
    """Factors of safety at the largest threshold."""
    loaded = [row for row in model.resistances if row.load is not None]
    if not loaded:
        return None
    threshold = max(row.threshold for row in loaded)
    rows = []
    for row in loaded:
        if row.threshold != threshold:
            continue
        found, *rest = resistance_cell(row, cap_of(model, row.attack)).split("\n")
        interval = next((line for line in rest if line.startswith("[")), "")
        factor = next((line.removeprefix("factor ") for line in rest if line.startswith("factor")), "-")
        rows.append([row.attack, f"{found} {interval}".strip(), row.unit, f"{row.load:.3g}", factor, row.load_is])
    head = ["attack", f"budget for {threshold:.0%}", "unit", "load", "factor", "what is divided by what"]
    return Table("Factor of safety", head, rows)


def _budget(attack: AttackResult) -> str:
    """An attack's budget in short: numbers and words, but neither texts nor what is unset."""
    shown = {
        key: value
        for key, value in mapping_of(attack.budget).items()
        if value is not None and key != "seed" and len(describe(value)) <= MOST_CHARACTERS
    }
    return describe(shown) or "-"
