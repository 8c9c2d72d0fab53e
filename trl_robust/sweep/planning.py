"""What a grid comes down to: the runs to make, those that are made, and cells that share another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..estimate.shapes import find_config
from ..organism.model import make_model, make_tokenizer
from ..recipes import Recipe, RecipeError, resolved_recipe
from .cells import BEFORE, Cell
from .grid import ORGANISM_DATA, OWN_KEYS, Grid, cell_recipe
from .same import Shape, effect_of, why_same
from .work import DONE, CellWork, OrganismWork

LIBRARIES = ("trl-robust", "torch", "trl", "transformers")
DATA_KEYS = ("dataset_name", "benign_dataset_name", "retain_dataset_name")


@dataclass(frozen=True)
class Plan:
    """
    What there is to do.

    Args:
        organisms (`list` of [`OrganismWork`]):
            One a seed, if the grid has organisms.
        runs (`list` of [`CellWork`]):
            Every cell that is run, with every seed, seed by seed; first the models before training.
        same (`dict`):
            Name of a cell -> the cell that it shares the runs of, and why.
        notes (`list[str]`):
            What is to be known beforehand.
    """

    organisms: list[OrganismWork]
    runs: list[CellWork]
    same: dict[str, tuple[str, str]]
    notes: list[str]

    def missing(self) -> list[CellWork]:
        """The runs that are not finished."""
        return [run for run in self.runs if not (run.folder / DONE).is_file()]


def make_plan(grid: Grid) -> Plan:
    """
    Finds out which runs a grid needs.

    Args:
        grid ([`Grid`]):
            The grid.

    Returns:
        [`Plan`].
    """
    recipes = {cell.name: cell_recipe(grid.verb, grid.settings(cell.settings, grid.seeds[0])) for cell in grid.cells}
    notes: list[str] = []
    same = _same(grid, recipes, notes)
    organisms = []
    if grid.organism is not None:
        organisms = [OrganismWork(grid.organism_folder(seed), seed, grid.organism) for seed in grid.seeds]
    # The model before training depends on the seed only where the seed makes the model.
    runs = [_run(grid, BEFORE, grid.start, seed) for seed in (grid.seeds if organisms else grid.seeds[:1])]
    runs += [
        _run(grid, cell.name, cell.settings, seed)
        for seed in grid.seeds  # outermost, so that what is there after an interruption can be compared
        for cell in grid.cells
        if cell.name not in same
    ]
    return Plan(organisms, runs, same, notes)


def _run(grid: Grid, name: str, own: Mapping[str, Any], seed: int) -> CellWork:
    settings = grid.settings(own, seed)
    recipe = cell_recipe(grid.verb, settings)
    identity = _identity(grid, recipe, name, seed)
    return CellWork(
        name=name,
        seed=seed,
        folder=grid.folder(name, seed),
        verb=grid.verb,
        settings=settings,
        trains=name != BEFORE,
        identity=identity,
        fingerprint=fingerprint(identity),
        evaluation=grid.evaluation,
        organism=grid.organism_folder(seed) if grid.organism else None,
        keep_model=grid.keep_models,
    )


def _identity(grid: Grid, recipe: Recipe, name: str, seed: int) -> dict[str, Any]:
    """All that decides what a run gives. Where it is written does not, nor where the organism is."""
    settings = resolved_recipe(recipe)
    if grid.organism is not None:
        settings |= {key: Path(settings[key]).name for key in ORGANISM_DATA if settings.get(key)}
        settings["model_name_or_path"] = f"organism/{Path(settings['model_name_or_path']).name}"
    if name == BEFORE:
        settings = {"model_name_or_path": settings["model_name_or_path"]}
    names = [] if grid.organism or name == BEFORE else [settings.get(key) for key in DATA_KEYS]
    files = {str(file): _hash(file) for file in (*names, *grid.evaluation.files()) if file and Path(file).is_file()}
    identity = {
        "training": {key: value for key, value in settings.items() if key not in OWN_KEYS},
        "seed": seed,
        "organism": asdict(grid.organism) if grid.organism is not None else None,
        "evaluation": grid.evaluation.identity(),
        "files": files,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    # As it will be read again: tuples become lists, enumerations their values.
    return json.loads(json.dumps(identity, default=lambda value: getattr(value, "value", str(value))))


def _hash(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """
    A fingerprint of all that decides what a run gives.

    Args:
        identity (`Mapping`):
            Plain values.

    Returns:
        `str`.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def refuse_changed(plan: Plan) -> None:
    """
    Stops if a finished run was made with other settings than the grid has now.

    Args:
        plan ([`Plan`]):
            What there is to do.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: naming every such run, and what has changed.
    """
    faults = []
    for run in plan.runs:
        if not (run.folder / DONE).is_file():
            continue
        done = json.loads((run.folder / DONE).read_text(encoding="utf-8"))
        if done["fingerprint"] != run.fingerprint:
            changes = _changes(done["settings"], run.identity)
            faults.append(
                f"{run.title} was finished with other settings ({'; '.join(changes)}). Remove {run.folder} to run it "
                "again, or name another `output_dir`."
            )
    if faults:
        raise RecipeError(faults, "The grid")


def _changes(before: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two settings, as `key: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [line for name in names for line in _changes(before.get(name), now.get(name), str(name))]
    return [] if before == now else [f"{path}: {before} -> {now}"]


def _same(grid: Grid, recipes: Mapping[str, Recipe], notes: list[str]) -> dict[str, tuple[str, str]]:
    """Cells that cannot differ from another one: its name, and why."""
    shapes: dict[str, Shape | None] = {}
    for recipe in recipes.values():
        model = str(recipe.model.model_name_or_path)
        if model not in shapes:
            shapes[model] = _shape(grid, recipe)
            if shapes[model] is None:
                notes.append(
                    f"The configuration of {model} is not to be had, so that sites and radii are compared as written."
                )
    effects = {
        name: effect_of(recipe, shapes[str(recipe.model.model_name_or_path)]) for name, recipe in recipes.items()
    }
    # The baseline stands for its like, since differences are taken to it.
    order = sorted(grid.cells, key=lambda cell: cell.name != grid.baseline)
    first: dict[str, Cell] = {}
    same = {}
    for cell in order:
        other = first.setdefault(effects[cell.name].key, cell).name
        if other != cell.name:
            pair = (recipes[other], recipes[cell.name])
            same[cell.name] = (other, why_same(pair, (effects[other], effects[cell.name])))
    return same


def _shape(grid: Grid, recipe: Recipe) -> Shape | None:
    """Depth and width of a cell's model, if its configuration is to be had."""
    if grid.organism is not None:  # it may not be built yet
        config = make_model(make_tokenizer(["word"]), 0, grid.organism.num_layers).config
    else:
        try:
            config = find_config(recipe)[0].get_text_config()
        except RecipeError:
            return None
    return Shape(config.num_hidden_layers, config.hidden_size)
