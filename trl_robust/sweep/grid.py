"""A grid: one YAML file that names the runs to compare, read strictly, with every fault at once.

Its cells are the product of `axes` (a key and its values) and `paired` (an axis whose values set several keys
together), and single `cells` beside it. Every cell is a recipe: the base recipe, under `set`, under its own settings.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from ..organism import OrganismSettings
from ..organism.build import DATA_NAMES
from ..recipes import VERBS, Recipe, RecipeError, load_recipe, verb_of
from ..recipes.loading import shown, unknown
from ..recipes.reading import Given, read_yaml
from ..recipes.values import UnfitError, fit, nearest
from .cells import Cell, expand, slug_of
from .evaluate_keys import EvaluateKeys, Evaluation

T = TypeVar("T")

VERB = "sweep"
OWN_KEYS = ("verb", "output_dir", "seed", "data_seed", "resume_from_checkpoint", "push_to_hub")
"""Keys of a recipe that belong to the sweep, not to a cell."""
ORGANISM_DATA = ("dataset_name", "benign_dataset_name", "retain_dataset_name")
"""Keys that name a file of the organism where the grid has one."""
ORGANISM_MODELS = ("model", "base")
"""Folders of its models: aligned, and before the alignment."""


@dataclass
class GridKeys:
    """
    Keys of a grid's file.

    Parameters:
        verb (`str`):
            `sweep`.
        recipe (`str`):
            Base recipe, relative to the grid's file; its verb is the one that runs.
        output_dir (`str`, *optional*):
            Where everything goes. The command line may name another.
        organism (`dict`, *optional*):
            Every seed builds, once, the embedded organism with these settings ([`OrganismSettings`]; `{}` for the
            usual one), and uses its model and its data files.
        seeds (`list[int]`, *optional*):
            Every cell runs once a seed; that of the base recipe by default.
        set (`dict`, *optional*):
            Settings of all cells, over the base recipe's.
        axes (`dict`, *optional*):
            A key and the list of its values; axes multiply.
        paired (`dict`, *optional*):
            Name of an axis -> label of a value -> the settings that change together.
        cells (`dict`, *optional*):
            Name -> settings: cells beside the product. No settings is the base recipe itself.
        baseline (`str`):
            The cell that differences are taken to.
        evaluate (`dict`, *optional*):
            How every model is measured ([`EvaluateKeys`]).
        keep_models (`bool`, *optional*, defaults to `False`):
            Whether weights stay when a cell has been measured.
    """

    verb: str = VERB
    recipe: str | None = None
    output_dir: str | None = None
    organism: dict | None = None
    seeds: list[int] = field(default_factory=list)
    set: dict = field(default_factory=dict)
    axes: dict = field(default_factory=dict)
    paired: dict = field(default_factory=dict)
    cells: dict = field(default_factory=dict)
    baseline: str | None = None
    evaluate: dict = field(default_factory=dict)
    keep_models: bool = False


@dataclass(frozen=True)
class Grid:
    """
    A grid that has been read and expanded.

    Args:
        path (`Path`):
            Its file.
        verb (`str`):
            The training verb of its cells.
        recipe (`Path`):
            The base recipe.
        output_dir (`Path`):
            Where everything goes.
        seeds (`tuple[int, ...]`):
            Seeds.
        cells (`tuple[Cell, ...]`):
            Cells, in their order.
        baseline (`str`):
            Name of the cell that differences are taken to.
        organism ([`OrganismSettings`], *optional*):
            The organism to build for every seed.
        evaluation ([`Evaluation`]):
            How every model is measured.
        keep_models (`bool`):
            Whether weights stay.
        start (`dict`):
            Base recipe and `set`: what names the model before training.
    """

    path: Path
    verb: str
    recipe: Path
    output_dir: Path
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    baseline: str
    organism: OrganismSettings | None
    evaluation: Evaluation
    keep_models: bool
    start: dict[str, Any]

    def organism_folder(self, seed: int) -> Path:
        """Where a seed's organism is."""
        return self.output_dir / "organisms" / f"seed-{seed}"

    def folder(self, name: str, seed: int) -> Path:
        """Where what is kept of a cell's run with a seed is."""
        return self.output_dir / "cells" / slug_of(name) / f"seed-{seed}"

    def settings(self, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """A cell's settings with a seed and the organism's files."""
        return _with_organism(dict(settings), self.organism_folder(seed) if self.organism else None) | {"seed": seed}


def cell_recipe(verb: str, settings: Mapping[str, Any], *, check: bool = False, this_machine: bool = False) -> Recipe:
    """
    Reads a cell's settings as a recipe.

    Args:
        verb (`str`):
            Training verb.
        settings (`Mapping`):
            All keys.
        check (`bool`, *optional*, defaults to `False`):
            As for [`~trl_robust.recipes.load_recipe`].
        this_machine (`bool`, *optional*, defaults to `False`):
            As there.

    Returns:
        [`~trl_robust.recipes.Recipe`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: what is wrong with them.
    """
    # By way of a file: of what can stand in a recipe, a command line takes a part only.
    with tempfile.TemporaryDirectory(prefix="trl-robust-") as folder:
        file = Path(folder) / "cell.yaml"
        text = yaml.safe_dump({**settings, "verb": verb}, sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        try:
            recipe = load_recipe(verb, ["--config", str(file)], check=check, this_machine=this_machine)
        except RecipeError as error:
            faults = [re.sub(r" \(line [^)]*\)", "", fault) for fault in error.faults]
            raise RecipeError(faults, "The cell") from error
    recipe.path = None
    return recipe


def load_grid(path: Path, *, output_dir: str | None = None, seeds: list[int] | None = None) -> Grid:
    """
    Reads, checks and expands a grid.

    Args:
        path (`Path`):
            Its file.
        output_dir (`str`, *optional*):
            Instead of the file's.
        seeds (`list[int]`, *optional*):
            Instead of the file's.

    Returns:
        [`Grid`].

    Raises:
        [`~trl_robust.recipes.RecipeError`]: listing every fault of the grid and of its cells.
    """
    given, faults = read_yaml(path)
    if not given and faults:
        raise RecipeError(faults, str(path))
    keys = fit_keys(GridKeys, given, faults)
    if output_dir is not None:
        keys.output_dir = output_dir
    if keys.output_dir is None:
        faults.append("`output_dir` is missing: name the folder for everything that is written.")
    if keys.verb != VERB:
        faults.append(f"`verb` is {keys.verb}; a grid's is `{VERB}`.")
    base_path, verb, base = _base_recipe(path, keys.recipe, faults)
    organism = _organism(keys.organism, faults)
    evaluation = _evaluation(keys.evaluate, organism is not None, faults)
    start = {**{name: value for name, value in base.items() if name not in OWN_KEYS}, **keys.set}
    cells = expand(keys.axes, keys.paired, keys.cells, start, faults)
    seeds = _seeds(keys.seeds if seeds is None else seeds, base, faults)
    if keys.baseline is None:
        faults.append("`baseline` is missing: name the cell that differences are taken to.")
    elif keys.baseline not in (names := [cell.name for cell in cells]):
        faults.append(f"`baseline` is {keys.baseline!r}, which is no cell{nearest(keys.baseline, names) or '.'}")
    grid = Grid(
        path=path,
        verb=verb or "",
        recipe=base_path,
        output_dir=Path(keys.output_dir or ".").expanduser(),
        seeds=tuple(seeds),
        cells=tuple(cells),
        baseline=str(keys.baseline),
        organism=organism,
        evaluation=evaluation,
        keep_models=keys.keep_models,
        start=start,
    )
    if verb is not None and seeds:
        faults += _faults_of_cells(grid)
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)), str(path))
    return grid


def fit_keys(cls: type[T], given: Mapping[str, Given], faults: list[str], inside: str = "") -> T:
    """
    Keys of a mapping as an instance of a dataclass; faults are added, and what is faulty keeps its default.

    Args:
        cls (`type`):
            Dataclass of the keys.
        given (`Mapping[str, Given]`):
            What was written.
        faults (`list[str]`):
            Faults found so far.
        inside (`str`, *optional*):
            Key of the mapping, if it is not the whole file.

    Returns:
        An instance of `cls`.
    """
    fields: dict[str, Any] = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints, values = get_type_hints(cls), {}
    for name, item in given.items():
        if name not in fields:
            faults.append(inside + unknown(name, item, list(fields)))
            continue
        try:
            values[name] = fit(item.value, hints[name], fields[name].metadata.get("choices"))
        except UnfitError as error:
            faults.append(f"{inside}`{name}` ({item.place}) is {shown(item)}; {error}.")
    return cls(**values)


def _base_recipe(grid: Path, recipe: str | None, faults: list[str]) -> tuple[Path, str | None, dict[str, Any]]:
    """The base recipe's file, its verb if it trains, and its keys."""
    if recipe is None:
        faults.append("`recipe` is missing: name the recipe that the cells are variants of, relative to this file.")
        return grid, None, {}
    path = Path(recipe).expanduser()
    path = Path(os.path.normpath(grid.parent / path))  # an absolute path stays itself
    given, found = read_yaml(path)
    faults += [f"`recipe` {path}: {fault}" for fault in found]
    if not given:
        return path, None, {}
    verb = verb_of(path)
    if verb not in VERBS:
        faults.append(f"`recipe` {path} is for `{verb}`; a cell trains with one of {', '.join(VERBS)}.")
        return path, None, {}
    return path, verb, {name: item.value for name, item in given.items()}


def _seeds(given: list[int], base: Mapping[str, Any], faults: list[str]) -> list[int]:
    if not given:
        seed = base.get("seed", 42)  # 42 is what transformers seeds with
        given = [seed] if isinstance(seed, int) else [42]
    for seed in given:
        if not 0 <= seed < 2**32:
            faults.append(f"`seeds` has {seed}; a seed is from 0 to {2**32 - 1}.")
    if len(set(given)) < len(given):
        faults.append(f"`seeds` names a seed twice: {given}. Keep one.")
    return given


def _organism(given: dict | None, faults: list[str]) -> OrganismSettings | None:
    if given is None:
        return None
    rows = {str(key): Given(value, "`organism`") for key, value in given.items()}
    found: list[str] = []
    hints = get_type_hints(OrganismSettings)
    values = {}
    for name, item in rows.items():
        if name not in hints:
            found.append(unknown(name, item, list(hints)))
            continue
        try:
            values[name] = fit(item.value, hints[name])
        except UnfitError as error:
            found.append(f"`{name}` of `organism` is {shown(item)}; {error}.")
    try:
        settings = OrganismSettings(**values)
    except ValueError as error:
        found.append(f"`organism`: {error}")
        settings = OrganismSettings()
    faults += found
    return settings


def _evaluation(given: dict, organism: bool, faults: list[str]) -> Evaluation:
    found: list[str] = []
    rows = {str(key): Given(value, "`evaluate`") for key, value in given.items()}
    keys = fit_keys(EvaluateKeys, rows, found)
    evaluation, problems = keys.evaluation(organism)
    faults += found + [f"`evaluate`: {problem}" for problem in problems]
    return evaluation


def _with_organism(settings: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return settings
    files = {key: str(folder / "data" / Path(settings[key]).name) for key in ORGANISM_DATA if settings.get(key)}
    model = Path(settings.get("model_name_or_path") or "model").name
    return {**settings, "model_name_or_path": str(folder / model), **files}


def _faults_of_cells(grid: Grid) -> list[str]:
    """What is wrong with the cells as recipes; what is wrong with all of them is said once."""
    found: dict[str, list[str]] = {}
    for cell in grid.cells:
        faults = [f"`{key}` belongs to the sweep. Remove it." for key in cell.settings if key in OWN_KEYS]
        if "env" in cell.own:  # one process runs many cells
            faults.append("`env` is the same for all cells. Set it in the base recipe.")
        if grid.organism is not None:
            faults += [
                f"`{key}` is {cell.settings[key]}; with `organism` it is one of the organism's files: "
                f"{', '.join(DATA_NAMES)}."
                for key in ORGANISM_DATA
                if cell.settings.get(key) and Path(cell.settings[key]).name not in DATA_NAMES
            ]
            if Path(model := cell.settings.get("model_name_or_path") or "model").name not in ORGANISM_MODELS:
                faults.append(f"`model_name_or_path` is {model}; with `organism` it is its `base` or its `model`.")
        try:
            recipe = cell_recipe(grid.verb, grid.settings(cell.settings, grid.seeds[0]))
        except RecipeError as error:
            faults += error.faults
        else:
            if recipe.launch:
                faults.append(f"{', '.join(f'`{key}`' for key in recipe.launch)}: cells run in one process each.")
        for fault in dict.fromkeys(faults):
            found.setdefault(fault, []).append(cell.name)
    lines = []
    for fault, names in found.items():
        which = "Every cell" if len(names) == len(grid.cells) > 1 else ", ".join(f"Cell {name!r}" for name in names)
        lines.append(f"{which}: {fault}")
    return lines
