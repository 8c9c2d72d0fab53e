"""From the runs on disk to the figures of each cell and their differences to the baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from .cells import BEFORE
from .grid import Grid
from .measures import COMPLIANCE, UTILITY
from .planning import Plan
from .serving import TRAINING
from .stages import SELECTION, selection_of
from .statistics import Estimate, Scores, difference_of, mean_of, mean_over, product_of, scores_of
from .wordings import MEASURES, scores_by_case
from .work import DONE, EARLIER, HARMLESS, MEASURING, WORDINGS

SCHEMA = 1
MEAN = "mean success"
PRODUCT = f"{COMPLIANCE} x {UTILITY}"

SEARCH = {
    "relative norm": "relative_norm",
    "loss change": "loss_change_abs_end",
    "feasible": "feasible_end",
    "lambda": "lambda_end",
}
"""What is shown of the search of a paraphrasing run, and the log's name for it; means over the run."""


@dataclass
class Scored:
    """
    All that was scored of a cell.

    Args:
        by_measure (`dict`):
            Name of an attack, `mean success`, `worst-case accuracy` and the like, `compliance` or `utility` -> scores
            by seed and request.
        runs (`list[dict]`):
            What else is known of each run.
    """

    by_measure: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def scores(self, name: str) -> Scores:
        """Scores by seed; empty if there are none."""
        return self.by_measure.get(name, {})

    def add(self, name: str, seed: int, scores: dict[str, float]) -> None:
        if scores:
            self.by_measure.setdefault(name, {})[seed] = scores


def tabulate(grid: Grid, plan: Plan, failed: Mapping[str, str]) -> dict[str, Any]:
    """
    The figures of every cell, over the seeds that are finished.

    Args:
        grid ([`Grid`]):
            The grid.
        plan ([`Plan`]):
            Its runs.
        failed (`Mapping`):
            Title of a run -> why it failed.

    Returns:
        `dict`: what is written into `sweep.json`.
    """
    attacks = list(grid.evaluation.attacks)
    folders: dict[str, dict[int, Path]] = {}
    for run in plan.runs:
        if (run.folder / DONE).is_file():
            folders.setdefault(run.name, {})[run.seed] = run.folder
    scored = {name: _read(found, attacks, grid.evaluation.mean_over) for name, found in folders.items()}
    baseline = scored.get(plan.same.get(grid.baseline, (grid.baseline, ""))[0], Scored())
    measures = [*attacks, MEAN, *(MEASURES if grid.evaluation.wordings else ()), COMPLIANCE, UTILITY]
    cells = [_figures(BEFORE, scored.get(BEFORE, Scored()), baseline, measures)]
    for cell in grid.cells:
        other, why = plan.same.get(cell.name, (cell.name, ""))
        figures = _figures(cell.name, scored.get(other, Scored()), baseline, measures)
        figures |= {"settings": cell.own, "same_as": other if why else None, "why_same": why or None}
        cells.append(figures)
    return {
        "schema": SCHEMA,
        "grid": str(grid.path),
        "recipe": str(grid.recipe),
        "verb": grid.verb,
        "then": {"verb": grid.then.verb, "recipe": str(grid.then.recipe)} if grid.then is not None else None,
        "baseline": grid.baseline,
        "seeds": list(grid.seeds),
        "attacks": attacks,
        "mean_over": list(grid.evaluation.mean_over),
        "judge": grid.evaluation.judge,
        "wordings": grid.evaluation.wordings is not None,
        "notes": plan.notes,
        "missing": [run.title for run in plan.missing() if run.title not in failed],
        "failed": dict(failed),
        "cells": cells,
    }


def _read(folders: Mapping[int, Path], attacks: Sequence[str], mean_attacks: Sequence[str]) -> Scored:
    found = Scored()
    for seed, folder in sorted(folders.items()):
        generations = _lines(folder / "generations.jsonl")
        by_attack = {name: scores_of([row for row in generations if row["attack"] == name]) for name in attacks}
        for name, scores in by_attack.items():
            found.add(name, seed, scores)
        found.add(MEAN, seed, mean_over(by_attack, mean_attacks))
        if (folder / WORDINGS).is_file():
            for name, scores in scores_by_case(_lines(folder / WORDINGS)).items():
                found.add(name, seed, scores)
        harmless = _lines(folder / HARMLESS)
        for name in (COMPLIANCE, UTILITY):
            found.add(name, seed, scores_of([row for row in harmless if row["set"] == name]))
        entry = _json(folder / "results.json")["models"][0]
        value = entry["utility"].get("value")
        if seed not in found.scores(UTILITY) and value is not None:
            found.add(UTILITY, seed, {"benchmarks": value})  # lm-eval gives no rows
        for name, task in entry.get("benchmarks", {}).items():
            found.add(f"{name} (lm-eval)", seed, {"benchmarks": task["value"]})
        for name, value in selection_of(folder / EARLIER).items():
            if name in SELECTION:
                found.add(name, seed, {"selection": value})
        found.runs.append(_run(seed, folder, entry))
    return found


def _run(seed: int, folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A run by itself: its figures, its cost, where it is."""
    done = _json(folder / DONE)
    record = _json(folder / "run.json") if (folder / "run.json").is_file() else {}
    train = record.get("phases", {}).get("train", {})
    return {
        "seed": seed,
        "folder": str(folder),
        "fingerprint": done["fingerprint"],
        "success": {attack["name"]: attack["success"] for attack in entry["attacks"]},
        "unscored": sum(attack["n_errored"] + attack["n_skipped"] for attack in entry["attacks"]),
        "wordings": {name: entry["wordings"][key] for name, key in MEASURES.items()} if "wordings" in entry else {},
        "utility": entry["utility"].get("value"),
        "over_refusal": entry["over_refusal"].get("value"),
        "boundary_fraction": record.get("losses", {}).get("boundary_fraction"),
        "search": _search(folder / TRAINER_STATE_NAME),
        "selection": selection_of(folder / EARLIER),
        "updates": train.get("updates"),
        "forward_passes": train.get("forward_passes"),
        "seconds": {"training": done["seconds"][TRAINING], "measuring": done["seconds"][MEASURING]},
        "hardware": record.get("hardware"),
        "versions": done["settings"]["versions"],
    }


def _search(state: Path) -> dict[str, float]:
    """Means over a run's log of what its searches for paraphrases came to; empty for other runs."""
    history = _json(state)["log_history"] if state.is_file() else []
    values = {shown: [entry[name] for entry in history if name in entry] for shown, name in SEARCH.items()}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def _figures(name: str, scored: Scored, baseline: Scored, measures: Sequence[str]) -> dict[str, Any]:
    more = [measure for measure in scored.by_measure if measure.endswith(" (lm-eval)") or measure in SELECTION]
    measures = [*measures, *more]
    figures: dict[str, Estimate] = {measure: mean_of(scored.scores(measure)) for measure in measures}
    figures[PRODUCT] = _product(scored)
    differences = {measure: difference_of(scored.scores(measure), baseline.scores(measure)) for measure in measures}
    return {"name": name, "figures": figures, "differences": differences, "runs": scored.runs}


def headline(table: Mapping[str, Any]) -> list[str]:
    """
    What a table shows first: the success of attacks, accuracy over wordings, or where neither was measured, utility.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `list[str]`: names of measures.
    """
    names = [MEAN] if table["attacks"] else []
    return [*names, *(MEASURES if table["wordings"] else ())] or [UTILITY]


def worth(table: Mapping[str, Any]) -> list[str]:
    """
    What a model is good for, as far as a table has it.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `list[str]`: `compliance`, `utility` and their product, of which grids without attacks may lack some.
    """
    if table["attacks"]:
        return [COMPLIANCE, UTILITY, PRODUCT]
    names = [COMPLIANCE, UTILITY]
    there = [name for name in names if any(cell["figures"][name]["value"] is not None for cell in table["cells"])]
    return [*there, *([PRODUCT] if len(there) == 2 else [])]


def _product(scored: Scored) -> Estimate:
    """Compliance x utility; where only one of them was measured, that one."""
    parts = [scored.scores(name) for name in (COMPLIANCE, UTILITY) if scored.scores(name)]
    return product_of(*parts) if len(parts) == 2 else mean_of(parts[0] if parts else {})


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
