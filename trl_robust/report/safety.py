"""The factor of safety: how much an attack needs, and how far that is beyond what a model has to bear."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .content import Section, Table
from .generalized_reading import Load, ResistanceRow
from .reading import ModelResult, Results
from .values import Interval

RESISTANCE_TEXT = (
    "Resistance is the smallest budget with which an attack breaks that share of the requests, the best so far "
    "counted, with a 95 % bootstrap interval over requests; > stands before the largest budget that was tried where "
    "none did. The factor of safety divides it by what the model has to bear, the load, which is said below for every "
    "attack. Above 1 a model bears more than it will meet."
)


def safety(results: Results) -> Section | None:
    """Resistance and factor of safety by attack, threshold and model; `None` where neither was measured."""
    models = [model for model in results.models if model.resistances]
    if not models:
        return None
    tables: list[Table] = []
    for threshold in sorted({row.threshold for model in models for row in model.resistances}, reverse=True):
        caption = f"Budget that breaks {threshold:.0%} of the requests, and the factor of safety"
        head = ["attack", *(model.name for model in models)]
        tables.append(Table(caption, head, _rows(models, threshold), folded=bool(tables)))
    measured = _loads(models)
    if measured is not None:
        tables.insert(1, measured)
    return Section(
        "Factor of safety",
        [RESISTANCE_TEXT],
        tables=tables,
        pairs=divided(models),
        pairs_title="What is divided by what",
    )


def resistance_cell(row: ResistanceRow | None, cap: float | None = None) -> str:
    """
    Resistance with its interval, and the factor of safety, one a line.

    Args:
        row ([`ResistanceRow`], *optional*):
            The row; `None` where the attack was not run.
        cap (`float`, *optional*):
            The largest budget, beyond which an end of the interval may lie.

    Returns:
        `str`.
    """
    if row is None:
        return "not run"
    if row.resistance is None and row.censored_at is None:
        return "destroyed" if row.n_destroyed else "no score"
    lines = [f"{row.resistance:.4g}" if row.resistance is not None else f"> {row.censored_at:.4g}"]
    if row.interval is not None and row.interval[0] != math.inf:
        lines.append(_ends(row.interval, row.censored_at if cap is None else cap))
    if row.factor is not None:
        lines.append(f"factor {row.factor:.2g}")
    elif row.factor_above is not None:
        lines.append(f"factor > {row.factor_above:.2g}")
    if row.n_destroyed:
        lines.append(f"{row.n_destroyed} destroyed")
    return "\n".join(lines)


def cap_of(model: ModelResult, attack: str) -> float | None:
    """The largest budget at which an attack was tried on a model that stayed intact; `None` without a curve."""
    curve = model.attacks[attack].curve if attack in model.attacks else ()
    return max((point.budget for point in curve if not point.destroyed), default=None)


def divided(models: Sequence[ModelResult]) -> dict[str, str]:
    """
    What is divided by what, by attack; attacks with the same load stand together.

    Args:
        models (sequence of [`~trl_robust.report.reading.ModelResult`]):
            Models.

    Returns:
        `dict` from names of attacks to what the factor of safety divides.
    """
    said: dict[str, list[str]] = {}
    for model in models:
        for row in model.resistances:
            if row.load is None:
                continue
            load = model.loads.get(row.attack)
            if load is not None and load.load is not None:
                what = f"relative {row.unit} at the threshold / {load.load_is}"
            else:
                what = f"{row.load_is or f'{row.unit} at the threshold / load'} (load: {row.unit} {row.load:.4g})"
            names = said.setdefault(what, [])
            if row.attack not in names:
                names.append(row.attack)
    found: dict[str, str] = {}
    for what, names in said.items():
        shown = ", ".join(names)
        found[shown] = f"{found[shown]}; elsewhere {what}" if shown in found else what
    return found


def _rows(models: Sequence[ModelResult], threshold: float) -> list[list[str]]:
    found = [{row.attack: row for row in model.resistances if row.threshold == threshold} for model in models]
    rows = []
    for attack in dict.fromkeys(attack for by_attack in found for attack in by_attack):
        unit = next(by_attack[attack].unit for by_attack in found if attack in by_attack)
        cells = [
            resistance_cell(by_attack.get(attack), cap_of(model, attack))
            for model, by_attack in zip(models, found, strict=True)
        ]
        rows.append([f"{attack}\n{unit}", *cells])
    return rows


def _loads(models: Sequence[ModelResult]) -> Table | None:
    """Loads that were measured; attacks with the same ones share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for attack in dict.fromkeys(attack for model in models for attack in model.loads):
        cells = tuple(_load_cell(model, model.loads.get(attack)) for model in models)
        rows.setdefault(cells, []).append(attack)
    if not rows:
        return None
    caption = "Load: how far the attacks on prompts that broke a model move its hidden states, as a relative radius"
    return Table(
        caption, ["attack", *(m.name for m in models)], [[", ".join(names), *cells] for cells, names in rows.items()]
    )


def _load_cell(model: ModelResult, load: Load | None) -> str:
    if load is None:
        return "not run"
    if load.load is None:
        return "-"
    lines = [f"{load.load:.3g}"]
    if load.interval is not None:
        lines.append(f"[{load.interval[0]:.3g}, {load.interval[1]:.3g}]")
    lines += [f"site {load.site}", f"n {load.n}"]
    if load.measured_on and load.measured_on != model.name:
        lines.append(f"of {load.measured_on}")
    return "\n".join(lines)


def _ends(interval: Interval, cap: float | None) -> str:
    beyond = "inf" if cap is None else f"> {cap:.4g}"
    low, high = (beyond if end == math.inf else f"{end:.4g}" for end in interval)
    return f"[{low}, {high}]"
