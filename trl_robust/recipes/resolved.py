"""The settings of a run as a recipe that gives them again."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from .arguments import PARTS, Recipe

HEADER = "# As resolved by trl-robust"
"""How every `recipe.yaml` of ours begins."""

NEVER_WRITTEN = {"hub_token", "local_rank"}
"""A secret, and what the launcher sets."""


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """
    What was given, plus every setting that differs from its default because of it.

    Loading the result gives the same settings. A `hub_token` is left out.

    Args:
        recipe ([`Recipe`]):
            Settings as [`load_recipe`] returns them; to be called before a trainer has changed them.

    Returns:
        `dict`: keys and plain values, `verb` first.
    """
    values = {"verb": recipe.verb, **{name: _as_written(value) for name, value in recipe.given.items()}}
    for name, part in PARTS.items():
        cls, settings = part(recipe.verb), getattr(recipe, name)
        # The defaults after the class's own checks: transformers replaces some by what they stand for.
        usual = cls(use_cpu=True) if name == "training" else cls()
        for field in dataclasses.fields(cls):
            if field.name in values or not field.init or field.name == "use_cpu":
                continue
            value = getattr(settings, field.name)
            raw = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value not in (raw, getattr(usual, field.name)) and _is_plain(value):
                values[field.name] = value.value if isinstance(value, Enum) else value
    if recipe.environment:
        values["env"] = dict(recipe.environment)
    return {name: value for name, value in (values | recipe.launch).items() if name not in NEVER_WRITTEN}


def _as_written(value: Any) -> Any:
    """A value as a recipe writes it: TRL makes objects of the mappings in `datasets`, in place."""
    if isinstance(value, list):
        return [_as_written(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: entry for name, entry in dataclasses.asdict(value).items() if entry is not None}
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | Enum)


def recipe_text(values: dict[str, Any]) -> str:
    """
    Settings as the text of a recipe, `recipe.yaml` in a run's folder.

    Args:
        values (`dict`):
            What [`resolved_recipe`] returns.

    Returns:
        `str`: YAML with a header that says how to run it. `resume_from_checkpoint` is left out: it says how a process
        starts, not what the run is.
    """
    values = {name: value for name, value in values.items() if name != "resume_from_checkpoint"}
    header = (
        f"{HEADER} {__version__}. To run it again:\n"
        f"# trl-robust {values['verb']} --config recipe.yaml --output_dir ANOTHER_FOLDER\n"
    )
    return header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def recipes_folder() -> Path:
    """
    Where the recipes are that come with the package.

    Returns:
        `Path`: `recipes/` of a clone, or its copy in an installed wheel.
    """
    package = Path(__file__).parents[1]
    return package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"
