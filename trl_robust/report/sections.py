"""What a generalised evaluation says, as tables of plain text; the page and the Markdown lay them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .curve_figures import CLASSES, worst_of_class
from .reading import ModelResult, Results
from .tables import attack_cell, measure_cell
from .values import describe, mapping_of


@dataclass(frozen=True)
class Table:
    """
    A table of plain text.

    Args:
        caption (`str`):
            What it shows.
        head (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence[str]]`):
            Cells; a line break stands between a value and what belongs to it.
        folded (`bool`, *optional*, defaults to `False`):
            Whether a page shows it only when asked.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """
    A section of the report.

    Args:
        heading (`str`):
            Heading.
        text (`Sequence[str]`):
            Paragraphs.
        tables (`Sequence[Table]`):
            Tables below them.
    """

    heading: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


RESISTANCE_TEXT = (
    "Resistance is the smallest budget with which an attack breaks that share of the requests, the best so far "
    "counted, with a 95 % bootstrap interval over requests; > stands before the largest budget that was tried where "
    "none did. The factor of safety divides it by what the model has to bear, which is said below for every attack. "
    "Above 1 a model bears more than it will meet."
)
PROXY_TEXT = (
    "Does what is measured on hidden states and weights tell how attacks on prompts fare? Rank correlation over "
    "models, with its bootstrap interval and permutation p; the error of predicting the success of an attack on "
    "prompts that was left out, beside that of the mean of the others; and the share of models on which the "
    "generalised attack succeeds at least as often as every attack on prompts (it errs on the safe side)."
)


def sections(results: Results) -> list[Section]:
    """
    Sections on what a generalised evaluation adds; none for other evaluations.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `list` of [`Section`].
    """
    made = (stands_out, safety, proxy, judges, controls)
    return [found for make in made if (found := make(results)) is not None]


def stands_out(results: Results) -> Section | None:
    """The strongest attack of every class on each model; `None` where only one class was run."""
    kinds = [kind for kind in CLASSES if any(worst_of_class(model, kind) for model in results.models)]
    generalised = any("threshold" in row for model in results.models for row in model.factor_of_safety)
    if len(kinds) < 2 or not generalised:
        return None
    rows = []
    for model in results.models:
        row = [_named(model)]
        for kind in kinds:
            worst = worst_of_class(model, kind)
            row.append("-" if worst is None else "\n".join([*attack_cell(worst), worst.name]))
        rows.append([*row, "\n".join(measure_cell(model.utility)), "\n".join(measure_cell(model.over_refusal))])
    head = ["model", *(f"on {CLASSES[kind]}" for kind in kinds), "utility", "over-refusal"]
    left_out = mapping_of(results.suite.get("left_out"))
    text = ["The attack of every class that succeeds most often. Lower is safer."]
    if left_out:
        text.append("Not run, for want of data: " + "; ".join(f"{name} {why}" for name, why in left_out.items()) + ".")
    return Section("What stands out", text, [Table("Strongest attack of every class", head, rows)])


def safety(results: Results) -> Section | None:
    """Resistance and factor of safety by attack, threshold and model."""
    found: dict[float, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for model in results.models:
        for row in model.factor_of_safety:
            threshold, attack = row.get("threshold"), row.get("attack")
            if isinstance(threshold, int | float) and isinstance(attack, str):
                found.setdefault(float(threshold), {}).setdefault(attack, {})[model.name] = row
    if not found:
        return None
    names = [model.name for model in results.models if model.factor_of_safety]
    tables: list[Table] = []
    for threshold in sorted(found, reverse=True):
        rows = []
        for attack, by_model in found[threshold].items():
            unit = next((str(row.get("unit") or "") for row in by_model.values()), "")
            rows.append([f"{attack}\n{unit}", *(resistance_cell(by_model.get(name)) for name in names)])
        caption = f"Budget that breaks {threshold:.0%} of the requests, and the factor of safety"
        tables.append(Table(caption, ["attack", *names], rows, folded=bool(tables)))
    return Section("Factor of safety", [RESISTANCE_TEXT], [*tables, *_divided(results)])


def resistance_cell(row: Mapping[str, Any] | None) -> str:
    """Resistance with its interval, and the factor of safety, one a line."""
    if row is None:
        return "not run"
    value, cap = row.get("resistance"), row.get("censored_at")
    if value is None and cap is None:
        return "destroyed" if row.get("n_destroyed") else "no score"
    lines = [f"{value:.4g}" if value is not None else f"> {cap:.4g}"]
    ends = row.get("interval")
    if isinstance(ends, list) and len(ends) == 2 and value is not None:
        # JSON has no infinity: an end that is missing lies beyond the largest budget.
        low, high = ("inf" if end is None else f"{end:.4g}" for end in ends)
        lines.append(f"[{low}, {high}]")
    if row.get("factor") is not None:
        lines.append(f"factor {row['factor']:.2g}")
    elif row.get("factor_above") is not None:
        lines.append(f"factor > {row['factor_above']:.2g}")
    if row.get("n_destroyed"):
        lines.append(f"{row['n_destroyed']} destroyed")
    return "\n".join(lines)


def _divided(results: Results) -> list[Table]:
    """What is divided by what, by attack and load."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for model in results.models:
        for row in model.factor_of_safety:
            if row.get("load") is not None and isinstance(row.get("threshold"), int | float):
                load = row["load"]
                shown = f"{load:.3g}" if isinstance(load, int | float) else str(load)
                names = said.setdefault((str(row.get("attack")), shown, str(row.get("load_is"))), [])
                if model.name not in names:
                    names.append(model.name)
    total = len([model for model in results.models if model.factor_of_safety])
    rows = [
        [attack, load, what, "all" if len(names) == total else ", ".join(names)]
        for (attack, load, what), names in said.items()
    ]
    head = ["attack", "load", "what is divided by what", "models"]
    return [Table("What the factor of safety divides", head, rows)] if rows else []


def proxy(results: Results) -> Section | None:
    """Whether generalised attacks tell how attacks on prompts fare."""
    if not results.proxy:
        return None
    rows, notes = [], []
    for name, study in results.proxy.items():
        correlations = mapping_of(study.get("correlations"))
        cells = [_correlation(mapping_of(correlations.get(of))) for of in ("largest", "mean")]
        prediction, rate = mapping_of(study.get("prediction")), mapping_of(study.get("conservative"))
        rows.append([name, *cells, _error(prediction), _rate(rate), describe(study.get("n"))])
        notes.append(str(study.get("note") or ""))
    head = ["measure", "rho, largest of the prompt attacks", "rho, their mean"]
    head += ["error of an attack left out", "conservative", "n"]
    table = Table("Generalised measures against attacks on prompts", head, rows)
    return Section("Is it a proxy?", [PROXY_TEXT, *dict.fromkeys(note for note in notes if note)], [table])


def _correlation(found: Mapping[str, Any]) -> str:
    if found.get("rho") is None:
        return str(found.get("why") or "-")
    lines = [f"{found['rho']:.2f}"]
    if found.get("interval"):
        lines.append(f"[{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]")
    if found.get("p") is not None:
        lines.append(f"p {found['p']:.2g}")
    return "\n".join(lines)


def _error(found: Mapping[str, Any]) -> str:
    if found.get("error") is None:
        return str(found.get("why") or "-")
    return f"{found['error']:.2f}\nwithout it {found['baseline']:.2f}"


def _rate(found: Mapping[str, Any]) -> str:
    if found.get("rate") is None:
        return str(found.get("why") or "-")
    ends = found.get("interval")
    return f"{found['rate']:.2f}" + (f"\n[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def judges(results: Results) -> Section | None:
    """What further judges say, and how far they agree with the first."""
    rows = []
    for model in results.models:
        for attack in model.attacks.values():
            for other in attack.second_judges:
                second = "no score" if other.success is None else f"{other.success:.2f}"
                if other.interval is not None:
                    second += f"\n[{other.interval[0]:.2f}, {other.interval[1]:.2f}]"
                agreement = "-" if other.agreement is None else f"{other.agreement:.2f}"
                kappa = "-" if other.kappa is None else f"{other.kappa:.2f}"
                first = "\n".join([*attack_cell(attack)[:2], attack.judge])
                rows.append(
                    [model.name, attack.name, first, f"{second}\n{other.judge}", agreement, kappa, str(other.n)]
                )
    if not rows:
        return None
    head = ["model", "attack", "first judge", "second judge", "agreement", "kappa", "n"]
    text = (
        "The same answers, judged twice. Agreement is the share of answers on which both say the same; kappa is 0 "
        "where they agree as often as chance has it."
    )
    return Section("Judges side by side", [text], [Table("Two judges", head, rows, folded=len(rows) > 24)])


def controls(results: Results) -> Section | None:
    """Every attack beside its random control."""
    names = results.control_names
    if not names:
        return None
    rows = []
    for name in names:
        of = next(model.attacks[name].control_of for model in results.models if name in model.attacks)
        row = [of]
        for model in results.models:
            pair = [attack_cell(model.attacks.get(one))[0] for one in (of, name)]
            row.append(f"{pair[0]}\nrandom {pair[1]}")
        rows.append(row)
    text = (
        "A random change of the same budgets, judged in the same way. An attack that does no better than its control "
        "has found nothing."
    )
    head = ["attack", *(model.name for model in results.models)]
    return Section("Against chance", [text], [Table("Success of attacks and of their random controls", head, rows)])


def _named(model: ModelResult) -> str:
    return f"! {model.name}" if model.warnings else model.name
