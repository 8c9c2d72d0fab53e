"""What a generalised evaluation found: judged answers, curves, resistance and factor of safety, and the proxy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .curves import envelope
from .generalized import ModelRun
from .judged_lines import HIDDEN, JudgedLine, Rows
from .judges import exact, is_refusal
from .judging import agreement
from .load import LatentLoad
from .metrics import attack_success
from .proxy import LEAST_MODELS, proxy_study
from .resistance import THRESHOLDS, measured_resistance
from .suite import Judge, best_attempts, budget_of, harmless_rate, judge_entry


def model_entry(
    run: ModelRun,
    lines: Sequence[JudgedLine],
    judges: Sequence[Judge],
    loads: Mapping[str, tuple[str, LatentLoad]],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
) -> dict[str, Any]:
    """
    A model's entry in `results.json`.

    Args:
        run ([`~trl_robust.evaluation.generalized.ModelRun`]):
            The model's run, done.
        lines (sequence of [`JudgedLine`]):
            What [`judge_run`] gives.
        judges (sequence of judges):
            Who judged.
        loads (`Mapping[str, tuple[str, LatentLoad]]`):
            For every latent line the model on which its load was measured, and the load.
        thresholds (sequence of `float`, *optional*):
            Shares of requests at which resistance is read.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstraps.

    Returns:
        `dict`.
    """
    of_suite = [line for line in lines if line.line in run.suite.lines]
    entry: dict[str, Any] = {
        "name": run.name,
        "attacks": [line_entry(line, judges, seed) for line in of_suite],
        "utility": harmless_rate("exact answers", run.harmless("questions"), exact),
        "over_refusal": harmless_rate(
            "refused look-alikes", run.harmless("look-alikes"), lambda _, text: is_refusal(text)
        ),
        "perplexity": run.measured("perplexity"),
        "benchmarks": run.measured("benchmarks"),
        "coherence": run.coherence(),
        "loads": {name: {**load, "measured_on": model} for name, (model, load) in loads.items()},
        "factor_of_safety": [
            row
            for line in of_suite
            if line.line.control_of is None
            for row in resistance_rows(line, loads.get(line.line.name), thresholds, seed)
        ],
        "cost": {"seconds": round(run.seconds, 1)},
    }
    if run.suite.map_lines:
        entry["map"] = map_entry([line for line in lines if line.line in run.suite.map_lines])
    return entry


def line_entry(found: JudgedLine, judges: Sequence[Judge], seed: int = 0) -> dict[str, Any]:
    """
    An attack's entry in `results.json`: the best so far at the largest budget at which the model is intact.

    Args:
        found ([`JudgedLine`]):
            The judged line.
        judges (sequence of judges):
            Who judged.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstraps.

    Returns:
        `dict`.
    """
    line, last = found.line, (found.intact or [len(found.line.points) - 1])[-1]
    attack = line.points[last].attack
    rows = found.pooled()
    entry = {
        "name": line.name,
        "attack": attack.name,
        "class": attack.attack_class,
        "version": attack.version,
        "budget": budget_of(attack),
        **judge_entry(judges[0]),
        **attack_success(best_attempts(rows), seed=seed),
        "control_of": line.control_of,
        "axis": line.axis or None,
        "seconds": round(found.seconds, 2),
    }
    if not found.intact:  # every request is accounted for: what a destroyed model says is not scored
        requests = {row["id"] for part in found.verdicts[0] for row in part}
        entry["n_skipped"] = len(requests) - entry["n_scored"] - entry["n_errored"]
    tries = found.verdicts[0][last]
    if len(tries) > len({row["id"] for row in tries}):
        entry["success_of_one_attempt"] = attack_success(tries, seed=seed)["success"]
    if line.axis and (len(line.points) > 1 or found.destroyed):
        entry["curve"] = _curve(found, seed)
    second = []
    for number, judge in enumerate(judges[1:], 1):
        other = found.pooled(number)
        second.append(
            {
                **judge_entry(judge),
                **attack_success(best_attempts(other), seed=seed),
                "agreement": agreement(rows, other, seed=seed),
            }
        )
    if second:
        entry["second_judges"] = second
    return entry


def _curve(found: JudgedLine, seed: int) -> list[dict[str, Any]]:
    curve = found.curve()
    best = _best([curve[number] for number in found.intact])
    return [
        {
            "budget": budget,
            **attack_success(rows, seed=seed),
            "best": None if number in found.destroyed else best.get(budget),
            "capability": found.capability[number],
            "destroyed": number in found.destroyed,
        }
        for number, (budget, rows) in enumerate(curve)
    ]


def _best(curve: Sequence[tuple[float, Rows]]) -> dict[float, float]:
    if not any(row["status"] == "scored" for _, rows in curve for row in rows):
        return {}
    try:
        found = envelope(curve)
    except ValueError:  # no request was scored at every budget
        return {}
    return dict(zip(found.budgets.tolist(), found.success.tolist(), strict=True))


def resistance_rows(
    found: JudgedLine, load: tuple[str, LatentLoad] | None, thresholds: Sequence[float], seed: int = 0
) -> list[dict[str, Any]]:
    """
    Resistance to an attack, and the factor of safety where there is a load, at every threshold.

    Args:
        found ([`JudgedLine`]):
            The judged line.
        load (`tuple[str, LatentLoad]`, *optional*):
            For an attack on hidden states: the model on which the load was measured, and the load.
        thresholds (sequence of `float`):
            Shares of requests.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `list[dict]`: none for an attack without a budget.
    """
    line = found.line
    if not line.axis:
        return []
    size, what = line.load, line.load_is
    if load is not None and load[1]["load"]:
        size = load[1]["load"]
        what = (
            f"relative radius at the threshold / load measured on {load[0]} at site {load[1]['site']}: "
            f"{load[1]['load_is']}"
        )
    rows = []
    for threshold in thresholds:
        try:
            rows.append(
                dict(
                    measured_resistance(
                        line.name,
                        found.curve(),
                        threshold,
                        unit=line.axis,
                        load=size,
                        load_is=what,
                        capability=found.capability if found.measures_capability else None,
                        untouched=found.untouched,
                        higher_is_better=found.higher_is_better,
                        seed=seed,
                    )
                )
            )
        except ValueError as error:  # nothing was scored
            rows.append({"attack": line.name, "unit": line.axis, "threshold": threshold, "why": str(error)})
    return rows


def map_entry(lines: Sequence[JudgedLine]) -> dict[str, Any]:
    """
    Success of latent attacks by site and radius.

    Args:
        lines (sequence of [`JudgedLine`]):
            One a site.

    Returns:
        `dict` with `sites`, `radii`, `success` (rows are sites), `n` and `steps`.
    """
    cells = [[attack_success(rows, num_resamples=1) for _, rows in line.curve()] for line in lines]
    attacks: list[Any] = [line.line.attack for line in lines]
    return {
        "sites": [str(attack.sites[0]) for attack in attacks],
        "radii": [point.budget for point in lines[0].line.points],
        "success": [[cell["success"] for cell in row] for row in cells],
        "n": max(cell["n_scored"] for row in cells for cell in row),
        "steps": attacks[0].steps,
    }


def generation_rows(run: ModelRun, lines: Sequence[JudgedLine], judges: Sequence[Judge]) -> Rows:
    """
    A model's rows of `generations.jsonl`.

    Args:
        run ([`~trl_robust.evaluation.generalized.ModelRun`]):
            The model's run.
        lines (sequence of [`JudgedLine`]):
            Its judged lines.
        judges (sequence of judges):
            Who judged; the verdicts of all but the first stand under `judges`.

    Returns:
        `list[dict]`.
    """
    names = [judge_entry(judge)["judge"] for judge in judges]
    rows = []
    for found in lines:
        for number, point in enumerate(found.line.points):
            for position, row in enumerate(found.verdicts[0][number]):
                others = {name: found.verdicts[i][number][position]["success"] for i, name in enumerate(names) if i}
                budget = {} if point.budget is None else {"budget": point.budget}
                rows.append(
                    {
                        "model": run.name,
                        "attack": found.line.name,
                        **budget,
                        **row,
                        **({"judges": others} if others else {}),
                    }
                )
    return rows


def proxies(models: Sequence[Mapping[str, Any]], threshold: float, *, seed: int = 0) -> dict[str, Any]:
    """
    Whether success of, and resistance to, generalised attacks tells how attacks on prompts fare (lat.md 11.3).

    Args:
        models (sequence of `Mapping`):
            Entries of `results.json`.
        threshold (`float`):
            At which resistance is compared.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `dict`: a [`~trl_robust.evaluation.proxy.ProxyStudy`] for every generalised attack and for the mean of all;
        empty with fewer than four models, or without attacks of both kinds.
    """
    tables = [{one["name"]: one for one in model["attacks"] if one["control_of"] is None} for model in models]
    shared = [name for name in tables[0] if all(name in table for table in tables)] if tables else []
    inputs = [name for name in shared if tables[0][name]["class"] == "input"]
    others = [name for name in shared if tables[0][name]["class"] in (*HIDDEN, "weights")]
    if len(models) < LEAST_MODELS or not inputs or not others:
        return {}
    names = [str(model["name"]) for model in models]
    success = {name: [table[name]["success"] for table in tables] for name in shared}
    prompt = {name: success[name] for name in inputs}
    everywhere = [name for name in others if None not in success[name]]  # not destroyed on some models
    means = [_mean([success[name][number] for name in everywhere]) for number in range(len(models))]
    found = {"mean of all, success": proxy_study(names, means, prompt, of="success", seed=seed)}
    for name in others:
        found[f"{name}, success"] = proxy_study(names, success[name], prompt, of="success", seed=seed)
        values = [_resistance(model, name, threshold) for model in models]
        if any(value is not None for value in values):
            found[f"{name}, resistance at {threshold:g}"] = proxy_study(
                names, values, prompt, of="resistance", success=success[name], seed=seed
            )
    return dict(found)


def _resistance(model: Mapping[str, Any], attack: str, threshold: float) -> float | None:
    for row in model["factor_of_safety"]:
        if row["attack"] == attack and row["threshold"] == threshold:
            return math.inf if row.get("censored_at") is not None else row.get("resistance")
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
