"""Attacks by their names, as suites, grids and the command line ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..attacks import Attack

ATTACKS: dict[str, type] = {attack.name: attack for attack in get_args(Attack)}
"""Every attack by its name."""

DATA_FIELDS = ("examples", "harmful", "harmless", "templates", "attacker")
"""Fields of attacks that hold rows, texts or another model: no settings, they are given apart."""


def settings_of(name: str) -> list[str]:
    """
    Names of the settings of an attack.

    Args:
        name (`str`):
            One of [`ATTACKS`].

    Returns:
        `list[str]`.
    """
    return [field.name for field in dataclasses.fields(ATTACKS[name]) if field.name not in DATA_FIELDS]


def data_fields_of(name: str) -> list[str]:
    """
    Names of an attack's fields that hold rows, texts or another model.

    Args:
        name (`str`):
            One of [`ATTACKS`].

    Returns:
        `list[str]`.
    """
    return [field.name for field in dataclasses.fields(ATTACKS[name]) if field.name in DATA_FIELDS]


def needed_of(name: str, settings: Mapping[str, Any]) -> list[str]:
    """
    Those of [`data_fields_of`] that an attack cannot do without.

    Args:
        name (`str`):
            One of [`ATTACKS`].
        settings (`Mapping`):
            Its settings.

    Returns:
        `list[str]`.
    """
    if name == "refusal_direction":  # fields with defaults, since a file or a random direction needs none
        own = not settings.get("transferred") and settings.get("objective") != "random"
        return ["harmful", "harmless"] if own else []
    return [
        field.name
        for field in dataclasses.fields(ATTACKS[name])
        if field.name in DATA_FIELDS
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def has_control(name: str) -> bool:
    """
    Whether an attack has a random control: `objective="random"`.

    Args:
        name (`str`):
            One of [`ATTACKS`].

    Returns:
        `bool`.
    """
    hint = get_type_hints(ATTACKS[name]).get("objective")
    return get_origin(hint) is Literal and "random" in get_args(hint)


def named_attack(name: str, settings: Mapping[str, Any] | None = None, **data: Any) -> Attack:
    """
    An attack by its name.

    Args:
        name (`str`):
            One of [`ATTACKS`].
        settings (`Mapping`, *optional*):
            Its settings, as a YAML file gives them; the others keep their defaults.
        **data:
            Rows and the like by the name of the field ([`DATA_FIELDS`]). What is `None`, and what the attack has no
            field for, is left out.

    Returns:
        The attack.

    Raises:
        `ValueError`: no such attack, no such setting, a value that it refuses, or rows that it needs and has not.
    """
    if name not in ATTACKS:
        raise ValueError(f"`{name}` is no attack; choose among {', '.join(ATTACKS)}.")
    cls, values = ATTACKS[name], dict(settings or {})
    own = settings_of(name)
    if unknown := [key for key in values if key not in own]:
        allowed = f"it has {', '.join(own)}" if own else "it has none"
        raise ValueError(f"The attack `{name}` has no setting {', '.join(map(repr, unknown))}; {allowed}.")
    if isinstance(values.get("sites"), list):
        values["sites"] = tuple(values["sites"])
    for field in data_fields_of(name):
        if data.get(field) is not None:
            values[field] = tuple(data[field]) if field == "templates" else data[field]
    if missing := [field for field in needed_of(name, values) if field not in values]:
        raise ValueError(f"The attack `{name}` needs {' and '.join(f'`{field}`' for field in missing)}.")
    return cls(**values)
