"""A grid: one YAML file that names the runs to compare, read strictly, with every fault at once.

Its cells are the product of `axes` (a key and its values) and `paired` (an axis whose values set several keys
together), and single `cells` beside it. Every cell is a recipe: the base recipe, under `set`, under its own settings.
With `then` a second training follows, on what the first has left.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..organism import OrganismSettings
from ..recipes import VERBS, RecipeError, verb_of
from ..recipes.loading import shown, unknown
from ..recipes.reading import Given, read_yaml
from ..recipes.values import UnfitError, fit, nearest
from .cells import Cell, expand, slug_of
from .evaluate_keys import EvaluateKeys, Evaluation
from .faults import faults_of_cells
from .stages import OWN_KEYS, SELECTS, Stage, ThenKeys, split, waits, with_organism

T = TypeVar("T")

VERB = "sweep"


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
        then (`dict`, *optional*):
            A second training of every cell, on what the first has left ([`~trl_robust.sweep.stages.ThenKeys`]). Its
            keys stand beside those of the first with `then.` before their names.
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
    then: dict | None = None
    seeds: list[int] = field(default_factory=list)
    set: dict = field(default_factory=dict)
    axes: dict = field(default_factory=dict)
    paired: dict = field(default_factory=dict)
    cells: dict = field(default_factory=dict)
    baseline: str | None = None
    evaluate: dict = field(default_factory=dict)
    keep_models: bool = False


@dataclass(frozen=True)
class Then:
    """
    The second stage of all cells.

    Args:
        verb (`str`):
            Its training verb.
        recipe (`Path`):
            Its recipe.
        settings (`dict`):
            That recipe under `set`.
    """

    verb: str
    recipe: Path
    settings: dict[str, Any] = field(hash=False, repr=False)


@dataclass(frozen=True)
class Grid:
    """
    A grid that has been read and expanded.

    Args:
        path (`Path`):
            Its file.
        verb (`str`):
            The training verb of its cells; of their first stage, where there are two.
        recipe (`Path`):
            The base recipe.
        then ([`Then`], *optional*):
            The second stage of its cells.
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
    then: Then | None
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
        """A cell's settings with a seed and the organism's files; of two stages those of the first."""
        return self.stages(settings, seed)[0].settings

    def stages(self, settings: Mapping[str, Any], seed: int) -> list[Stage]:
        """The trainings of a cell with these settings and a seed, on the organism's files."""
        own = split(settings)
        all_of = [(self.verb, own[0])]
        if self.then is not None:
            all_of.append((self.then.verb, {**self.then.settings, **own[1]}))
        folder = self.organism_folder(seed) if self.organism else None
        return [Stage(verb, with_organism(dict(keys), folder) | {"seed": seed}) for verb, keys in all_of]

    def before(self, seed: int) -> Stage:
        """What names the model before training: that which comes out trained, not one that only chooses rows."""
        first, *later = self.stages(self.start, seed)
        return next((stage for stage in later if not waits(stage.settings.get("model_name_or_path"))), first)


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
    base_path, verb, base = _base_recipe(path, keys.recipe, "the recipe that the cells are variants of", faults)
    then = _then(path, keys.then, faults)
    if verb == SELECTS and keys.then is None:
        faults.append(
            f"`recipe` {base_path} is for `{SELECTS}`, which leaves rows and no model to measure. Give `then` a "
            "recipe that trains on them."
        )
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
        then=then,
        output_dir=Path(keys.output_dir or ".").expanduser(),
        seeds=tuple(seeds),
        cells=tuple(cells),
        baseline=str(keys.baseline),
        organism=organism,
        evaluation=evaluation,
        keep_models=keys.keep_models,
        start=start,
    )
    if verb is not None and seeds and (then is not None or keys.then is None):
        faults += faults_of_cells(grid)
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


def _base_recipe(
    grid: Path, recipe: str | None, what: str, faults: list[str]
) -> tuple[Path, str | None, dict[str, Any]]:
    """A base recipe's file, its verb if it trains, and its keys."""
    if recipe is None:
        faults.append(f"`recipe` is missing: name {what}, relative to this file.")
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


def _then(grid: Path, given: dict | None, faults: list[str]) -> Then | None:
    """The second stage; none where its recipe cannot be read, which is then among the faults."""
    if given is None:
        return None
    found: list[str] = []
    keys = fit_keys(ThenKeys, {str(key): Given(value, "`then`") for key, value in given.items()}, found)
    path, verb, base = _base_recipe(grid, keys.recipe, "the recipe of the second stage", found)
    if verb == SELECTS:
        found.append(
            f"`recipe` {path} is for `{SELECTS}`, which leaves rows and no model to measure. Name one for it."
        )
    faults += [f"`then`: {fault}" for fault in found]
    settings = {**{name: value for name, value in base.items() if name not in OWN_KEYS}, **keys.set}
    return Then(verb, path, settings) if verb is not None else None
