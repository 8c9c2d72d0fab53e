"""The cells of a grid: the product of its axes, and single cells beside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEFORE = "before training"
"""Name of the row that holds the model no cell has trained yet."""


@dataclass(frozen=True)
class Cell:
    """
    One set of settings.

    Args:
        name (`str`):
            What tables call it.
        own (`dict`):
            The settings that make it differ from the others.
        settings (`dict`):
            Base recipe, `set` and its own, in this order.
    """

    name: str
    own: dict[str, Any] = field(hash=False)
    settings: dict[str, Any] = field(hash=False, repr=False)

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return slug_of(self.name)


def slug_of(name: str) -> str:
    """
    A cell's name as the name of a folder.

    Args:
        name (`str`):
            Name.

    Returns:
        `str`: its words with hyphens between them.
    """
    return "-".join(re.findall(r"\w+(?:\.\w+)*", name))


def expand(axes: dict, paired: dict, single: dict, shared: Mapping[str, Any], faults: list[str]) -> list[Cell]:
    """
    The product of the axes, then the single cells.

    Args:
        axes (`dict`):
            A key and the list of its values.
        paired (`dict`):
            Name of an axis -> label of a value -> settings.
        single (`dict`):
            Name -> settings.
        shared (`Mapping`):
            Settings below those of every cell.
        faults (`list[str]`):
            Faults found so far; added to.

    Returns:
        `list` of [`Cell`].
    """
    parts_of = [*_plain_axes(axes, faults), *_paired_axes(paired, faults)]
    made = [
        (", ".join(label for label, _ in values), [settings for _, settings in values])
        for values in (itertools.product(*parts_of) if parts_of else [])
    ]
    for name, settings in single.items():
        if settings is None or isinstance(settings, dict):
            made.append((str(name), [settings or {}]))
        else:
            faults.append(f"`cells`: `{name}` is {settings!r}; a cell is a mapping of settings, such as {{}}.")
    if not made:
        faults.append("The grid has no cell. Give `axes`, `paired` or `cells`.")
    keys = [key for settings in (made[0][1] if made else []) for key in settings]
    faults += [f"`{key}` is set by two axes. Pair them in one." for key in dict.fromkeys(keys) if keys.count(key) > 1]
    cells = []
    for name, parts in made:
        own = {str(key): value for part in parts for key, value in part.items()}
        cells.append(Cell(name, own, {**shared, **own}))
    _check_names(cells, faults)
    return cells


def _plain_axes(axes: dict, faults: list[str]) -> list[list[tuple[str, dict[str, Any]]]]:
    found = []
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            faults.append(f"`axes`: `{key}` is {values!r}; an axis is a list of at least one value.")
            continue
        if any(values.count(value) > 1 for value in values):
            faults.append(f"`axes`: `{key}` has a value twice: {values}. Keep one.")
        found.append([(f"{key}={_shown(value)}", {key: value}) for value in values])
    return found


def _paired_axes(paired: dict, faults: list[str]) -> list[list[tuple[str, dict[str, Any]]]]:
    found = []
    for name, values in paired.items():
        if not isinstance(values, dict) or not values:
            faults.append(f"`paired`: `{name}` is {values!r}; it is a mapping from labels to settings.")
            continue
        wrong = [label for label, settings in values.items() if not isinstance(settings, dict)]
        faults += [f"`paired`: `{label}` of `{name}` is {values[label]!r}; settings are a mapping." for label in wrong]
        keys = {label: tuple(sorted(settings)) for label, settings in values.items() if label not in wrong}
        if len(set(keys.values())) > 1:
            faults.append(f"`paired`: the values of `{name}` set different keys; let each of them set all.")
        found.append([(str(label), settings) for label, settings in values.items() if label not in wrong])
    return found


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _check_names(cells: list[Cell], faults: list[str]) -> None:
    seen: dict[str, str] = {slug_of(BEFORE).lower(): BEFORE}
    for cell in cells:
        slug = cell.slug.lower()  # some file systems know no case
        if not slug:
            faults.append(f"The cell {cell.name!r} needs a name with letters or digits: it names a folder.")
        elif slug in seen:
            faults.append(f"The cells {seen[slug]!r} and {cell.name!r} would share the folder `{slug}`. Rename one.")
        seen[slug] = cell.name
