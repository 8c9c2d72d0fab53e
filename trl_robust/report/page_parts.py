"""Sections of the page that every evaluation has: attacks, other measures, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .content import Table
from .examples import REDACTED, Examples, redact, shorten
from .markup import breakable, folded, plain_table, table
from .reading import AttackResult, Measure, Results
from .tables import measure_cell
from .values import Interval, describe, interval_of, number_of

FOLDED = 30
"""Rows up to which a table stands open."""

COUNTS = ("n_errored", "n_skipped", "n_left_out")
"""Rows of a measure that are in no value."""


def attack_rows(results: Results) -> list[str]:
    """
    Counts, budget, judge and version of every attack, and what errored or was skipped by itself where they are many.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `list[str]`: HTML.
    """
    found = [(model.name, label, attack) for model in results.models for label, attack in model.attacks.items()]
    if not found:
        return ["<p>No attack was run.</p>"]
    parts = []
    if num_errored := sum(attack.n_errored for _, _, attack in found):
        parts.append(
            f'<p class="note marked">{num_errored} rows errored and are in no share. Where they are many, the shares '
            "are of the rows that happened to work.</p>"
        )
    rows = [("marked" if attack.n_errored else "", _attack_cells(model, attack)) for model, _, attack in found]
    head = ["model", "attack", "class", "scored", "errored", "skipped", "budget", "judge", "version"]
    caption = "Rows counted, budget, judge and version of every attack"
    made = table(caption, head, rows)
    if len(rows) <= FOLDED:
        return [*parts, made]
    if lost := _lost(results):
        parts.append(plain_table(lost))
    return [*parts, folded(f"{caption} ({len(rows)} rows)", made)]


def _lost(results: Results) -> Table | None:
    """What errored or was skipped, by attack and model; `None` where nothing was."""
    names = [*results.attack_names, *results.control_names]
    rows = []
    for name in names:
        found = [model.attacks.get(name) for model in results.models]
        if any(attack is not None and (attack.n_errored or attack.n_skipped) for attack in found):
            rows.append([name, *("not run" if attack is None else _lost_cell(attack) for attack in found)])
    head = ["attack", *(model.name for model in results.models)]
    return Table("Rows that errored or were skipped", head, rows) if rows else None


def _lost_cell(attack: AttackResult) -> str:
    counts = ((attack.n_errored, "errored"), (attack.n_skipped, "skipped"))
    return "\n".join(f"{count} {what}" for count, what in counts if count) or "-"


def _attack_cells(model: str, attack: AttackResult) -> list[str]:
    errored = f'<strong class="mark">{attack.n_errored}</strong>' if attack.n_errored else "0"
    return [
        escape(model),
        breakable(attack.name),
        escape(attack.kind),
        str(attack.n_scored),
        errored,
        str(attack.n_skipped),
        f'<div class="budget">{escape(describe(attack.budget)) or "-"}</div>',
        escape(attack.judge) or "-",
        escape(attack.version) or "-",
    ]


def measures(results: Results) -> list[Table]:
    """
    Tables of everything that is measured beside attack success; none where there is nothing.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        `list` of [`~trl_robust.report.content.Table`].
    """
    models = results.models
    tables = []
    used = [(model.name, model.utility, model.over_refusal) for model in models if model.utility or model.over_refusal]
    if used:
        head = ["model", _headed("utility", [one for _, one, _ in used])]
        head.append(_headed("over-refusal", [one for *_, one in used]))
        rows = [[name, _counted(utility), _counted(over_refusal)] for name, utility, over_refusal in used]
        tables.append(Table("Utility and over-refusal", head, rows))
    benchmarks: list[tuple[str, Mapping[str, object]]] = [
        (f"{model.name}\n{task}" if len(models) > 1 else task, _benchmark(row))
        for model in models
        for task, row in model.benchmarks.items()
    ]
    others: list[tuple[str, list[tuple[str, Mapping[str, object]]]]] = [
        ("Coherence of answers to harmless requests", [(m.name, _with_intervals(m.coherence)) for m in models]),
        ("Perplexity", [(model.name, _with_intervals(model.perplexity)) for model in models]),
        ("Benchmarks", benchmarks),
        ("Factor of safety", [(model.name, row) for model in models for row in model.factor_of_safety]),
        ("Unlearning", [(model.name, _numbers(model.unlearning)) for model in models]),
        ("Cost", [(model.name, model.cost) for model in models]),
    ]
    for caption, found in others:
        if rows_of := [(name, row) for name, row in found if row]:
            tables.append(_table(caption, rows_of))
    return tables


def _headed(what: str, found: Sequence[Measure | None]) -> str:
    names = dict.fromkeys(measure.name for measure in found if measure is not None and measure.name != what)
    return f"{what} ({', '.join(names)})" if names else what


def _counted(measure: Measure | None) -> str:
    lines = measure_cell(measure)
    return "\n".join(lines if measure is None or measure.n is None else [*lines, f"n {measure.n}"])


def _table(caption: str, found: Sequence[tuple[str, Mapping[str, object]]]) -> Table:
    keys = list(dict.fromkeys(str(key) for _, row in found for key in row))
    # A column without a value anywhere is a measure that was not asked for.
    keys = [key for key in keys if any(row.get(key) is not None for _, row in found)]
    return Table(caption, ["model", *keys], [[name, *(describe(row.get(key)) for key in keys)] for name, row in found])


def _with_intervals(values: Mapping[str, object]) -> dict[str, object]:
    """
    Measures with the interval that belongs to each (`x_interval`, or `interval` for the first) below its value, and
    how many rows are in none of them.
    """
    found: dict[str, object] = {}
    first = next(iter(values), "")
    for key, value in values.items():
        if key.endswith("interval") or (key in COUNTS and not value):
            continue
        ends: Interval | None = interval_of(values.get(f"{key}_interval"), key)
        if ends is None and key == first:
            ends = interval_of(values.get("interval"), key)
        found[key.replace("_", " ")] = _value(value, ends)
    return found


def _value(value: object, ends: Interval | None) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:.3g}" + (f"\n[{ends[0]:.3g}, {ends[1]:.3g}]" if ends else "")


def _benchmark(row: Mapping[str, object]) -> dict[str, object]:
    error = number_of(row.get("standard_error"), "standard error of a benchmark")
    value = number_of(row.get("value"), "value of a benchmark")
    rest = {str(key): item for key, item in row.items() if key not in ("name", "value", "standard_error")}
    if value is None:
        return {"value": "no score", **rest}
    return {"value": f"{value:.3f}" + ("" if error is None else f"\n± {error:.3f}"), **rest}


def _numbers(values: Mapping[str, object]) -> dict[str, object]:
    return {str(key).replace("_", " "): value for key, value in values.items()}


def example_rows(examples: Examples, show: bool) -> list[str]:
    """
    The first generation of each outcome, by model.

    Args:
        examples ([`~trl_robust.report.examples.Examples`]):
            Generations.
        show (`bool`):
            Whether their texts are shown, in place of length and marker.

    Returns:
        `list[str]`: HTML.
    """
    parts = []
    if examples.rows:
        explained = "The first generation of each outcome, for every model and attack." + (
            "" if show else f" {REDACTED}"
        )
        parts.append(f"<p>{escape(explained)}</p>")
    by_model: dict[str, list[tuple[str, list[str]]]] = {}
    for (model, attack, outcome), row in examples.rows.items():
        texts = [f'<div class="text">{_example_text(text, show)}</div>' for text in (row.prompt, row.response)]
        # A judge's reason may quote the response.
        cells = [breakable(attack), escape(outcome), escape(row.id), *texts, _example_text(row.reason, show)]
        by_model.setdefault(model, []).append(("", cells))
    head = ["attack", "outcome", "id", "prompt", "response", "reason"]
    for model, rows in by_model.items():
        made = table(f"Examples of {model}", head, rows)
        parts.append(folded(f"{model} ({len(rows)} examples)", made))
    if examples.num_unreadable:
        parts.append(
            f'<p class="note marked">{examples.num_unreadable} lines of generations.jsonl could not be read; a run '
            "that was killed leaves such a line.</p>"
        )
    return parts


def _example_text(text: str, show: bool) -> str:
    if not text:
        return '<span class="none">empty</span>'
    return escape(shorten(text)) if show else f'<span class="none">{redact(text)}</span>'
