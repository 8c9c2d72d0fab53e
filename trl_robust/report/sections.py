"""What a generalised evaluation adds to a report, section by section."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .content import Section, Table
from .curve_figures import CLASSES, curve_names, worst_of_class
from .generalized_reading import CurvePoint, Estimate, SecondJudge, Study
from .reading import AttackResult, ModelResult, Results
from .safety import safety
from .tables import attack_cell, measure_cell
from .values import Interval, mapping_of

PROXY_TEXT = (
    "Does what is measured on hidden states and weights tell how attacks on prompts fare? Rank correlation over "
    "models, with its bootstrap interval and permutation p; the error of predicting the success of an attack on "
    "prompts that was left out, with its interval and beside that of the mean of the others, and the same where the "
    "model is new as well; and the share of models on which the generalised attack succeeds at least as often as "
    "every attack on prompts (it errs on the safe side). A good proxy has rho near 1 for success, near -1 for "
    "resistance."
)
POINTS = "The points of every curve, with intervals"
OPEN_ROWS = 24
"""Rows up to which a table of judges stands open."""


def sections(results: Results, drawn: Collection[str]) -> list[Section]:
    """
    Sections below the overview: what a generalised evaluation adds; none for other evaluations.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.
        drawn (collection of `str`):
            Names of the figures that there are.

    Returns:
        `list` of [`Section`].
    """
    made = [safety(results)]
    if "curves" in drawn:
        made.append(Section("Success against budget", figures=["curves"], tables=curve_tables(results), fold=POINTS))
    if "sites" in drawn:
        made.append(Section("Where hidden states give way", figures=["sites"]))
    made += [proxy(results), judges(results), controls(results)]
    if stands_out(results) is not None:
        made.append(every_attack(results))
    return [found for found in made if found is not None]


def stands_out(results: Results) -> Section | None:
    """
    The strongest attack of every class on each model, which stands at the head of a generalised evaluation's report.

    `None` for other evaluations, and where only one class of attacks was run.
    """
    kinds = [kind for kind in CLASSES if any(worst_of_class(model, kind) for model in results.models)]
    if len(kinds) < 2 or not any(model.resistances for model in results.models):
        return None
    rows = []
    for model in results.models:
        row = [named(model)]
        for kind in kinds:
            worst = worst_of_class(model, kind)
            row.append("-" if worst is None else "\n".join([*attack_cell(worst), worst.name]))
        rows.append([*row, "\n".join(measure_cell(model.utility)), "\n".join(measure_cell(model.over_refusal))])
    head = ["model", *(f"on {CLASSES[kind]}" for kind in kinds), "utility", "over-refusal"]
    text = ["The attack of every class that succeeds most often on a model. Lower is safer."]
    if left_out := mapping_of(results.suite.get("left_out")):
        text.append("Not run, for want of data: " + "; ".join(f"{name} {why}" for name, why in left_out.items()) + ".")
    return Section("What stands out", text, tables=[Table("Strongest attack of every class", head, rows)])


def every_attack(results: Results) -> Section:
    """Success of all attacks, a row an attack."""
    rows = []
    for name in results.attack_names:
        kind = next(model.attacks[name].kind for model in results.models if name in model.attacks)
        cells = ("\n".join(attack_cell(model.attacks.get(name))) for model in results.models)
        rows.append([f"{name}\n{CLASSES.get(kind, 'plain requests' if kind == 'none' else kind)}", *cells])
    text = "The best so far at the largest budget at which the model was intact."
    head = ["attack", *(model.name for model in results.models)]
    return Section("Every attack", [text], tables=[Table("Attack success with intervals", head, rows)])


def curve_tables(results: Results) -> list[Table]:
    """The points of every curve, a table an attack: what the figure draws, and capability where it was measured."""
    tables = []
    for name in curve_names(results):
        curves = [model.attacks[name].curve if name in model.attacks else () for model in results.models]
        axis = next(model.attacks[name].axis for model in results.models if name in model.attacks)
        budgets = sorted({point.budget for curve in curves for point in curve})
        found = [{point.budget: point for point in curve} for curve in curves]
        rows = [[f"{budget:g}", *(_point(by_budget.get(budget)) for by_budget in found)] for budget in budgets]
        head = [axis or "budget", *(model.name for model in results.models)]
        tables.append(Table(f"Points of {name}", head, rows))
    return tables


def _point(point: CurvePoint | None) -> str:
    if point is None:
        return "not run"
    lines = ["no score" if point.success is None else f"{point.success:.2f}", *_ends(point.interval)]
    if point.n_errored:
        lines.append(f"{point.n_errored} errored")
    if point.capability is not None:
        lines.append(f"capability {point.capability:.3g}")
    return "\n".join([*lines, "! destroyed"] if point.destroyed else lines)


def proxy(results: Results) -> Section | None:
    """Whether generalised attacks tell how attacks on prompts fare."""
    if not results.proxy:
        return None
    head = ["measure", "rho, strongest attack on prompts", "rho, mean of them", "error, new attack"]
    head += ["error, new attack and model", "conservative", "n"]
    tables: list[Table] = []
    for of, caption in (("success", "Success of generalised attacks"), ("resistance", "Resistance to them")):
        rows = [_study_row(name, study) for name, study in results.proxy.items() if study.of == of]
        if rows:
            tables.append(Table(f"{caption}, against attacks on prompts", head, rows, folded=bool(tables)))
    notes = dict.fromkeys(study.note for study in results.proxy.values() if study.note)
    return Section("Is it a proxy?", [PROXY_TEXT, *notes], tables=tables)


def _study_row(name: str, study: Study) -> list[str]:
    cells = [_estimate(one) for one in (study.largest, study.mean, study.prediction, study.prediction_of_new_models)]
    return [name, *cells, _estimate(study.conservative), str(study.n)]


def _estimate(found: Estimate) -> str:
    if found.value is None:
        return "\n".join(["-", found.why]) if found.why else "-"
    lines = [f"{found.value:.2f}", *_ends(found.interval)]
    if found.p is not None:
        lines.append(f"p {found.p:.2g}")
    if found.baseline is not None:
        lines.append(f"without it {found.baseline:.2f}")
    return "\n".join(lines)


def judges(results: Results) -> Section | None:
    """What further judges say, and how far they agree with the first."""
    pairs: dict[tuple[str, str], list[tuple[ModelResult, AttackResult, SecondJudge]]] = {}
    for model in results.models:
        for attack in model.attacks.values():
            for other in attack.second_judges:
                pairs.setdefault((attack.judge, other.judge), []).append((model, attack, other))
    if not pairs:
        return None
    together = [_pair_row(*names, found) for names, found in pairs.items()]
    rows = []
    for (_, second), found in pairs.items():
        for model, attack, other in found:
            value = "no score" if other.success is None else f"{other.success:.2f}"
            first = "\n".join([*attack_cell(attack)[:2], attack.judge])
            cells = [_agreement(other.agreement, other.agreement_interval), _agreement(other.kappa, None)]
            errored = [f"{other.n_errored} errored"] if other.n_errored else []
            said = "\n".join([value, *_ends(other.interval), second, *errored])
            rows.append([model.name, attack.name, first, said, *cells, str(other.n)])
    head = ["model", "attack", "first judge", "second judge", "agreement", "kappa", "n"]
    text = (
        "The same answers, judged twice. Agreement is the share of answers on which both say the same; kappa is 0 "
        "where they agree as often as chance has it, and - where both say the same of all answers."
    )
    tables = [
        Table("Over all attacks", ["first judge", "second judge", "agreement", "lowest", "n"], together),
        Table("By attack", head, rows, folded=len(rows) > OPEN_ROWS),
    ]
    return Section("Judges side by side", [text], tables=tables)


def _pair_row(first: str, second: str, found: Sequence[tuple[ModelResult, AttackResult, SecondJudge]]) -> list[str]:
    known = [
        (other.agreement, other.n, model, attack) for model, attack, other in found if other.agreement is not None
    ]
    total = sum(n for _, n, _, _ in known)
    if not total:
        return [first, second, "-", "-", "0"]
    mean = sum(value * n for value, n, _, _ in known) / total
    value, _, model, attack = min(known, key=lambda one: one[0])
    return [first, second, f"{mean:.2f}", f"{value:.2f}\n{attack.name} on {model.name}", str(total)]


def _agreement(value: float | None, interval: Interval | None) -> str:
    return "-" if value is None else "\n".join([f"{value:.2f}", *_ends(interval)])


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
            attack, control = model.attacks.get(of), model.attacks.get(name)
            said = "! " if _found_nothing(model, attack, control) else ""
            row.append(f"{attack_cell(attack)[0]}\n{said}random {attack_cell(control)[0]}")
        rows.append(row)
    text = (
        "A random change of the same budgets, judged in the same way. An attack that does better than plain requests "
        "and no better than its control (marked) has found nothing: the change itself breaks the model."
    )
    head = ["attack", *(model.name for model in results.models)]
    caption = "Success of attacks and of their random controls"
    return Section("Against chance", [text], tables=[Table(caption, head, rows)])


def _found_nothing(model: ModelResult, attack: AttackResult | None, control: AttackResult | None) -> bool:
    """Whether an attack that beats plain requests does so by chance alone."""
    if attack is None or control is None or attack.success is None or control.success is None:
        return False
    plain = max((one.success or 0.0 for one in model.attacks.values() if one.kind == "none"), default=0.0)
    return attack.success > plain and control.success >= attack.success


def named(model: ModelResult) -> str:
    """A model's name with what speaks against reading its low success as safety."""
    return "\n".join([model.name, *(f"! {warning}" for warning in model.warnings)])


def _ends(interval: Interval | None) -> list[str]:
    return [] if interval is None else [f"[{interval[0]:.2f}, {interval[1]:.2f}]"]
