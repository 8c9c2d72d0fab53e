"""The attacks of a suite as lines: one attack at one budget or several, read off a mapping such as a YAML file has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..attacks import Attack
from .named import ATTACKS, data_fields_of, has_control, named_attack, needed_of, settings_of

CONTROL = " (random)"
"""What the name of a random control ends in."""

KEYS = ("attack", "load", "load_is", "rows")
"""Keys of an entry besides the attack's settings and its rows."""

TAMPERING = ("universal", "refusal_direction", "pruning", "finetune")
"""Attacks that change the model itself for all requests, so that its capability can be asked for under the attack."""

LOADS = {
    "input": "budget at the threshold / the strongest attack of this kind that is expected",
    "weights": "steps of this fine-tuning at the threshold / steps of fine-tuning that a user does",
}
"""What a load in a suite's file stands for unless `load_is` says otherwise, by the attack's class."""


@dataclass(frozen=True)
class Point:
    """
    An attack at one budget.

    Args:
        attack ([`~trl_robust.attacks.Attack`]):
            The attack.
        budget (`float`, *optional*):
            Its value on the line's axis; `None` for an attack without one.
    """

    attack: Attack
    budget: float | None = None


@dataclass(frozen=True)
class Line:
    """
    An attack of a suite at one budget or several.

    Args:
        name (`str`):
            Its name in the results.
        points (`tuple[Point, ...]`):
            By rising budget.
        axis (`str`, *optional*, defaults to `""`):
            What the budgets count, such as `"steps"`; empty without a curve.
        control_of (`str`, *optional*):
            Name of the line whose random control this is.
        load (`float`, *optional*):
            What the model has to bear, in the unit of the axis.
        load_is (`str`, *optional*):
            What is divided by what.
    """

    name: str
    points: tuple[Point, ...]
    axis: str = ""
    control_of: str | None = None
    load: float | None = None
    load_is: str | None = None

    @property
    def attack(self) -> Attack:
        """The attack at its largest budget."""
        return self.points[-1].attack

    @property
    def tampers(self) -> bool:
        """Whether the attack changes the model itself, for all requests."""
        return self.attack.name in TAMPERING


def read_lines(
    entries: Mapping[str, Mapping[str, Any] | None],
    rows_of: Callable[[str, str, str | None, int | None], Any],
    *,
    controls: bool = True,
    seed: int = 0,
) -> tuple[list[Line], dict[str, list[str]], list[str]]:
    """
    Reads the attacks of a suite.

    An entry is an attack's name with its settings. A list in place of the setting that is the attack's budget makes a
    curve. Under another name the key `attack` says which attack it is; `load` (and `load_is`) is what a factor of
    safety divides by; `rows` limits the rows read for it; a field of rows (`examples`, `harmful`, `harmless`) names a
    dataset of its own.

    Args:
        entries (`Mapping[str, Mapping]`):
            Entries by name.
        rows_of (`Callable`):
            Gives the rows for a field of an attack, from the attack's name, the field, the dataset named in the entry
            (or `None` for the suite's own) and the largest number of rows; `None` where there are none.
        controls (`bool`, *optional*, defaults to `True`):
            Whether every attack that has a random control gets it as a line of its own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every attack that has one and is given none.

    Returns:
        `tuple`: the lines, each followed by its control; the attacks that are left out because there are no rows for
        some of their fields, with these; and a sentence for every fault.
    """
    lines: list[Line] = []
    left_out: dict[str, list[str]] = {}
    faults: list[str] = []
    for name, given in entries.items():
        if given is not None and not isinstance(given, Mapping):
            faults.append(f"The attack `{name}` is {given!r}; its settings are a mapping, {{}} for the usual ones.")
            continue
        entry = dict(given or {})
        kind = entry.pop("attack", name)
        if kind not in ATTACKS:
            faults.append(f"`{kind}` is no attack; choose among {', '.join(ATTACKS)}.")
            continue
        try:
            line = _line(name, str(kind), entry, rows_of, seed)
            lines.append(line)
            if controls and has_control(str(kind)) and entry.get("objective") != "random":
                lines.append(_control(line))
        except _NoRowsError as error:
            left_out[name] = error.fields
        except ValueError as error:
            faults.append(f"The attack `{name}`: {error}")
    return lines, left_out, faults


class _NoRowsError(Exception):
    """There are no rows for some fields that an attack needs."""

    def __init__(self, fields: list[str]) -> None:
        super().__init__()
        self.fields = fields


def _line(name: str, kind: str, entry: dict[str, Any], rows_of: Any, seed: int) -> Line:
    load, load_is, limit = (entry.pop(key, None) for key in KEYS[1:])
    data = {item: rows_of(kind, item, entry.pop(item, None), limit) for item in data_fields_of(kind)}
    if missing := [item for item in needed_of(kind, entry) if data[item] is None]:
        raise _NoRowsError(missing)
    settings = settings_of(kind)
    if "seed" in settings:
        entry.setdefault("seed", seed)
    axis = ATTACKS[kind].budget_axis  # type: ignore[attr-defined]
    budgets = entry.get(axis) if axis else None
    if isinstance(budgets, list):
        if not budgets or any(isinstance(value, bool) or not isinstance(value, int | float) for value in budgets):
            raise ValueError(f"`{axis}` is {budgets!r}; a curve needs a list of numbers.")
        found = [
            Point(named_attack(kind, {**entry, axis: value}, **data), float(value)) for value in sorted(set(budgets))
        ]
    else:
        attack = named_attack(kind, entry, **data)
        found = [Point(attack, float(getattr(attack, axis)) if axis else None)]
    for point in found:
        if hasattr(point.attack, "threat"):
            _ = point.attack.threat  # its own checks
    attack_class = found[-1].attack.attack_class
    if load is None:
        if load_is is not None:
            raise ValueError("`load_is` says what a load is, and there is no `load`.")
    elif isinstance(load, bool) or not isinstance(load, int | float) or not load > 0:
        raise ValueError(f"`load` is {load!r}; it must be a number above 0, in the unit of `{axis}`.")
    elif not axis:
        raise ValueError("`load` needs an attack with a budget.")
    else:
        load_is = load_is or LOADS.get(attack_class)
        if load_is is None:
            raise ValueError("the load of an attack on hidden states is measured; remove `load`, or give `load_is`.")
    return Line(name, tuple(found), axis, None, load, load_is)


def _control(line: Line) -> Line:
    points = []
    for point in line.points:
        attack: Any = point.attack  # one of those with an objective
        points.append(Point(dataclasses.replace(attack, objective="random"), point.budget))
    return Line(line.name + CONTROL, tuple(points), line.axis, line.name)


def map_lines(sites: Sequence[str | int | float], radii: Sequence[float], steps: int, seed: int) -> list[Line]:
    """
    Latent attacks at single sites, for the heat map of site and radius.

    Args:
        sites (sequence of `str`, `int` or `float`):
            Sites; see [`~trl_robust.ThreatModel`].
        radii (sequence of `float`):
            Relative radii.
        steps (`int`):
            Steps of every search.
        seed (`int`):
            Seed.

    Returns:
        `list` of [`Line`], one a site.

    Raises:
        `ValueError`: sites or radii that the threat model refuses.
    """
    lines = []
    for site in sites:
        points = tuple(
            Point(
                named_attack("latent", {"sites": [site], "radius": radius, "steps": steps, "seed": seed}),
                float(radius),
            )
            for radius in sorted(set(radii))
        )
        for point in points:
            _ = point.attack.threat  # type: ignore[union-attr]
        lines.append(Line(f"map {site}", points, "radius"))
    return lines
