"""The trainings of a cell: one, or two where the grid has `then`. The second then takes what the first has left."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..recipes import Recipe, RecipeError, load_recipe

FIRST = "{first}"
"""In settings of the second stage: the folder of the first."""
SECOND = "then."
"""Before the name of a key of the second stage, where it stands beside those of the first."""
SELECTS = "seal"
"""The verb that leaves a selector and chosen rows, and no model."""

OWN_KEYS = ("verb", "output_dir", "seed", "data_seed", "resume_from_checkpoint", "push_to_hub")
"""Keys of a recipe that belong to the sweep, not to a cell."""
ORGANISM_DATA = ("dataset_name", "benign_dataset_name", "retain_dataset_name", "safe_dataset_name")
"""Keys that name a file of the organism where the grid has one."""
TRAIN_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "datasets")
"""Keys that name the rows to train on."""

SELECTION = {
    "selector AUROC": "auroc",
    "harmful rows kept": "kept_labelled_share",
}
"""What is shown of a first stage that has chosen rows, and where `selection.json` has it, under `labels`."""


@dataclass
class ThenKeys:
    """
    Keys of a grid's `then`.

    Parameters:
        recipe (`str`):
            Recipe of the second stage, relative to the grid's file; its verb is the one that runs.
        set (`dict`, *optional*):
            Settings over that recipe's. `{first}` in a value is the folder that the first stage has written.
    """

    recipe: str | None = None
    set: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """
    A training, or the model it would begin with.

    Args:
        verb (`str`):
            Training verb.
        settings (`dict`):
            All keys of its recipe but `output_dir`.
    """

    verb: str
    settings: dict[str, Any] = field(hash=False, repr=False)

    def recipe(self, *, check: bool = False, this_machine: bool = False, **more: Any) -> Recipe:
        """Its settings as a recipe, with `more` of them; see [`cell_recipe`]."""
        return cell_recipe(self.verb, {**self.settings, **more}, check=check, this_machine=this_machine)

    def after(self, folder: Path) -> Stage:
        """This stage when the first one is in a folder."""
        return Stage(self.verb, {key: _filled(value, str(folder)) for key, value in self.settings.items()})


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


def waits(value: Any) -> bool:
    """
    Whether a setting names what the first stage leaves.

    Args:
        value (`Any`):
            The setting's value.

    Returns:
        `bool`.
    """
    return FIRST in json.dumps(value, default=str)


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Settings of the first stage, and those of the second, which have `then.` before their names.

    Args:
        settings (`Mapping`):
            Of a cell.

    Returns:
        `tuple` of two `dict`.
    """
    first = {key: value for key, value in settings.items() if not key.startswith(SECOND)}
    return first, {key.removeprefix(SECOND): value for key, value in settings.items() if key.startswith(SECOND)}


def with_organism(settings: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """
    Settings with an organism's model and data in place of their namesakes.

    Args:
        settings (`dict`):
            Of a stage.
        folder (`Path`, *optional*):
            The organism's.

    Returns:
        `dict`.
    """
    if folder is None:
        return settings
    found = {
        key: str(folder / "data" / Path(settings[key]).name)
        for key in ORGANISM_DATA
        if settings.get(key) and not waits(settings[key])
    }
    if not waits(model := settings.get("model_name_or_path") or "model"):
        found["model_name_or_path"] = str(folder / Path(model).name)
    return {**settings, **found}


def before_the_first(stages: Sequence[Stage]) -> list[Stage]:
    """
    The stages as they can be checked before anything has run: a setting of the second that waits for the first is
    that of the first, since what it leaves are some of its rows, or its model after training.

    Args:
        stages (sequence of [`Stage`]):
            Of a cell.

    Returns:
        `list` of [`Stage`].
    """
    first, *later = stages
    found = [first]
    for stage in later:
        awaited = {key for key, value in stage.settings.items() if waits(value)}
        if awaited & set(TRAIN_DATA):
            awaited |= set(TRAIN_DATA)
        settings = {key: value for key, value in stage.settings.items() if key not in awaited}
        settings |= {key: first.settings[key] for key in awaited if key in first.settings}
        if first.settings.get("drop_long"):  # what the first stage leaves out does not come to the second
            settings["drop_long"] = True
        found.append(Stage(stage.verb, settings))
    return found


def selection_of(folder: Path) -> dict[str, Any]:
    """
    How well a first stage has told harmful rows from others.

    Args:
        folder (`Path`):
            Of the first stage.

    Returns:
        `dict`: the names of `SELECTION`, and `rows`, the number of rows that are kept; empty where no rows were
        chosen. A figure that does not exist, as without labels, is left out.
    """
    file = folder / "selection.json"
    if not file.is_file():
        return {}
    summary = json.loads(file.read_text(encoding="utf-8"))
    labels = summary["labels"] or {}
    found = {name: labels.get(key) for name, key in SELECTION.items()}
    return {"rows": summary["rows"]["kept"], **{name: value for name, value in found.items() if value is not None}}


def _filled(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(FIRST, folder)
    if isinstance(value, list):
        return [_filled(entry, folder) for entry in value]
    if isinstance(value, dict):
        return {key: _filled(entry, folder) for key, entry in value.items()}
    return value
