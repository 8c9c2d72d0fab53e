"""What a grid comes down to: the runs to make, those that are made, and cells that share another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..estimate.shapes import find_config
from ..organism.model import make_model, make_tokenizer
from ..recipes import Recipe, RecipeError, resolved_recipe
from .cells import BEFORE, Cell
from .grid import Grid
from .same import Effect, Shape, all_settings, effect_of, why_same
from .stages import ORGANISM_DATA, OWN_KEYS, Stage, waits
from .work import DONE, EARLIER, CellWork, OrganismWork

LIBRARIES = ("trl-robust", "torch", "trl", "transformers")


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
    recipes = {
        cell.name: [stage.recipe() for stage in grid.stages(cell.settings, grid.seeds[0])] for cell in grid.cells
    }
    notes: list[str] = []
    same = _same(grid, recipes, notes)
    organisms = []
    if grid.organism is not None:
        organisms = [OrganismWork(grid.organism_folder(seed), seed, grid.organism) for seed in grid.seeds]
    # The model before training depends on the seed only where the seed makes the model.
    before = grid.seeds if organisms else grid.seeds[:1]
    runs = [_run(grid, BEFORE, [grid.before(seed)], seed) for seed in before]
    runs += [
        _run(grid, cell.name, grid.stages(cell.settings, seed), seed)
        for seed in grid.seeds  # outermost, so that what is there after an interruption can be compared
        for cell in grid.cells
        if cell.name not in same
    ]
    return Plan(organisms, runs, same, notes)


def _run(grid: Grid, name: str, stages: Sequence[Stage], seed: int) -> CellWork:
    identity = _identity(grid, [stage.recipe() for stage in stages], name, seed)
    return CellWork(
        name=name,
        seed=seed,
        folder=grid.folder(name, seed),
        stages=tuple(stages),
        trains=name != BEFORE,
        identity=identity,
        fingerprint=fingerprint(identity),
        evaluation=grid.evaluation,
        organism=grid.organism_folder(seed) if grid.organism else None,
        keep_model=grid.keep_models,
    )


def _identity(grid: Grid, recipes: Sequence[Recipe], name: str, seed: int) -> dict[str, Any]:
    """All that decides what a run gives. Where it is written does not, nor where the organism is."""
    *earlier, last = [_training(grid, recipe) for recipe in recipes]
    before = {EARLIER: _own(earlier[0])} if earlier else {}
    if name == BEFORE:
        last = {"model_name_or_path": last["model_name_or_path"]}
    named = (
        [] if grid.organism or name == BEFORE else [one.get(key) for one in (*earlier, last) for key in ORGANISM_DATA]
    )
    files = {str(file): _hash(file) for file in (*named, *grid.evaluation.files()) if file and Path(file).is_file()}
    organism = asdict(grid.organism) if grid.organism is not None else None
    if organism is not None and organism["secrets"]:
        del organism["secrets"]  # younger than grids that are finished
    identity = {
        **before,
        "training": _own(last),
        "seed": seed,
        "organism": organism,
        "evaluation": grid.evaluation.identity(),
        "files": files,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    # As it will be read again: tuples become lists, enumerations their values.
    return json.loads(json.dumps(identity, default=lambda value: getattr(value, "value", str(value))))


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in OWN_KEYS}


def _training(grid: Grid, recipe: Recipe) -> dict[str, Any]:
    """Settings of a stage, with an organism's files by their names."""
    settings = resolved_recipe(recipe)
    if grid.organism is not None:
        own = [key for key in ORGANISM_DATA if settings.get(key) and not waits(settings[key])]
        settings |= {key: Path(settings[key]).name for key in own}
        if not waits(model := settings["model_name_or_path"]):
            settings["model_name_or_path"] = f"organism/{Path(model).name}"
    return settings


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


def _same(grid: Grid, recipes: Mapping[str, Sequence[Recipe]], notes: list[str]) -> dict[str, tuple[str, str]]:
    """Cells that cannot differ from another one: its name, and why."""
    shapes: dict[str, Shape | None] = {}
    effects: dict[str, list[Effect]] = {}
    for name, stages in recipes.items():
        effects[name] = []
        for recipe in stages:
            # A model that a first stage leaves has the shape of the one it began with.
            named = stages[0] if waits(recipe.model.model_name_or_path) else recipe
            model = str(named.model.model_name_or_path)
            if model not in shapes:
                shapes[model] = _shape(grid, named)
                if shapes[model] is None:
                    notes.append(
                        f"The configuration of {model} is not to be had, so that sites and radii are compared as "
                        "written."
                    )
            effects[name].append(effect_of(recipe, shapes[model]))
    # The baseline stands for its like, since differences are taken to it.
    order = sorted(grid.cells, key=lambda cell: cell.name != grid.baseline)
    first: dict[tuple[str, ...], Cell] = {}
    same = {}
    for cell in order:
        other = first.setdefault(tuple(effect.key for effect in effects[cell.name]), cell).name
        if other != cell.name:
            pairs = zip(recipes[other], recipes[cell.name], effects[other], effects[cell.name], strict=True)
            differing = [pair for pair in pairs if all_settings(pair[0]) != all_settings(pair[1])]
            reasons = [why_same(pair[:2], pair[2:]) for pair in differing]
            same[cell.name] = (other, "; ".join(reasons) or "they have the same settings")
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
