"""What is wrong with the cells of a grid as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..organism.folder import DATA_NAMES
from ..recipes import RecipeError
from .stages import FIRST, ORGANISM_DATA, OWN_KEYS, SECOND, Stage, split, waits

if TYPE_CHECKING:
    from .grid import Grid

ORGANISM_MODELS = ("model", "base")
"""Folders of an organism's models: aligned, and before the alignment."""


def faults_of_cells(grid: Grid) -> list[str]:
    """
    What is wrong with the cells of a grid.

    Args:
        grid ([`~trl_robust.sweep.grid.Grid`]):
            The grid.

    Returns:
        `list[str]`: a sentence for every fault; what is wrong with all cells is said once.
    """
    found: dict[str, list[str]] = {}
    for cell in grid.cells:
        first, second = split(cell.settings)
        own_first, own_second = split(cell.own)
        stages = grid.stages(cell.settings, grid.seeds[0])
        faults = _faults_of_stage(grid, stages[0], first, own_first)
        if awaiting := [key for key, value in first.items() if waits(value)]:
            faults.append(f"`{awaiting[0]}` names `{FIRST}`, which only the second stage (`then`) can.")
        if grid.then is not None:
            settings = {**grid.then.settings, **second}
            later = _faults_of_stage(grid, stages[1], settings, own_second)
            if not any(map(waits, settings.values())):
                later.append(
                    f"no setting names `{FIRST}`, so that the second stage takes nothing from the first. Name a file "
                    f'of its folder, such as `dataset_name: "{FIRST}/kept.jsonl"`.'
                )
            faults += [f"`then`: {fault}" for fault in later]
        elif second:
            faults.append(f"`{SECOND}{next(iter(second))}` is for a second stage. Give `then` its recipe.")
        for fault in dict.fromkeys(faults):
            found.setdefault(fault, []).append(cell.name)
    lines = []
    for fault, names in found.items():
        which = "Every cell" if len(names) == len(grid.cells) > 1 else ", ".join(f"Cell {name!r}" for name in names)
        lines.append(f"{which}: {fault}")
    return lines


def _faults_of_stage(grid: Grid, stage: Stage, settings: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What is wrong with a cell's stage: as it is written, and as a recipe."""
    faults = [f"`{key}` belongs to the sweep. Remove it." for key in settings if key in OWN_KEYS]
    if "env" in own:  # one process runs many cells
        faults.append("`env` is the same for all cells. Set it in the base recipe.")
    if grid.organism is not None:
        given = {key: value for key, value in settings.items() if value and not waits(value)}
        faults += [
            f"`{key}` is {given[key]}; with `organism` it is one of the organism's files: {', '.join(DATA_NAMES)}."
            for key in ORGANISM_DATA
            if key in given and Path(given[key]).name not in DATA_NAMES
        ]
        model = given.get("model_name_or_path") or "model"
        if Path(model).name not in ORGANISM_MODELS:
            faults.append(f"`model_name_or_path` is {model}; with `organism` it is its `base` or its `model`.")
    try:
        recipe = stage.recipe()
    except RecipeError as error:
        return faults + error.faults
    if recipe.launch:
        faults.append(f"{', '.join(f'`{key}`' for key in recipe.launch)}: cells run in one process each.")
    return faults
