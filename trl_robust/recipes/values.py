"""Values as written -> values of a field's type, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""What a command line may write for true and false."""


class UnfitError(Exception):
    """
    A value does not fit its field.

    Args:
        needed (`str`):
            What would: a clause without its full stop.
        inside (`bool`, *optional*, defaults to `False`):
            Whether the kind is right and something inside the value is wrong.
    """

    def __init__(self, needed: str, inside: bool = False) -> None:
        super().__init__(needed)
        self.inside = inside


def nearest(name: str, names: Iterable[str]) -> str:
    """
    "did you mean" for a name that is not one of `names`.

    Args:
        name (`str`):
            What was written.
        names (iterable of `str`):
            What there is.

    Returns:
        `str`: a phrase that starts with "; ", or nothing if no name is near.
    """
    close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.6)
    if not close:
        return ""
    likeness = [difflib.SequenceMatcher(None, match, name).ratio() for match in close]
    close = [match for match, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - 0.1]
    shown = [f"`{match}`" for match in close]
    return "; did you mean " + (shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}") + "?"


def fit(value: Any, hint: Any, choices: Iterable[Any] | None = None) -> Any:
    """
    Brings a value into the type of a field.

    Args:
        value (`Any`):
            A value as YAML gives it, or a string from a command line.
        hint (`Any`):
            The field's type.
        choices (iterable, *optional*):
            The only values allowed.

    Returns:
        The value, converted where nothing is lost (`"1e-4"` to a float, `8` to `"8"` for text).

    Raises:
        [`UnfitError`]: naming what is needed.
    """
    members = _members(hint)
    allowed = list(choices) if choices is not None else None
    means_nothing = isinstance(value, str) and value.lower() in ("null", "none") and str not in members
    if value is None or (means_nothing and value not in (allowed or ())):
        if type(None) in members:
            return None
        raise UnfitError(f"{_needed(members, choices)}, or remove the key")
    if allowed and isinstance(value, bool) and ("yes" if value else "no") in allowed:
        value = "yes" if value else "no"  # YAML 1.1 reads an unquoted `no` as false
    for member in members:
        try:
            found = _fit_one(value, member)
        except UnfitError as error:
            if error.inside:
                raise
            continue
        if allowed is not None and found not in allowed:
            raise UnfitError(_needed(members, allowed, str(value)))
        return found
    clause = _needed(members, choices, str(value))
    if isinstance(value, bool) and (str in members or allowed):
        clause += " (YAML reads yes, no, on and off as true or false unless they stand in quotes)"
    raise UnfitError(clause)


def _members(hint: Any) -> list[Any]:
    """The kinds a field takes, the more particular first; `bool`, `int`, `float` and `dict` exclude each other."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = [member for member in members if member is not str]  # `SchedulerType | str`: one of the names
    if str in members:  # takes what is no list, so it comes before lists and after all others
        members.sort(key=lambda kind: 1 if kind is str else 2 if get_origin(kind) is list else 0)
    return members


def _fit_one(value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is bool:
        return _fit_bool(value)
    if origin in (int, float):
        return _fit_number(value, origin)
    if origin is dict:
        return _fit_mapping(value)
    if origin is list:
        return _fit_list(value, get_args(kind)[0] if get_args(kind) else str)
    if origin is Literal:
        if value in get_args(kind):
            return value
    elif isinstance(origin, type) and issubclass(origin, Enum):
        text = "no" if value is False else value
        if text in {item.value for item in origin}:
            return text
    elif origin is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return value if isinstance(value, str) else repr(value)
    elif isinstance(origin, type) and dataclasses.is_dataclass(origin) and isinstance(value, dict):
        return _fit_fields(value, origin)
    raise UnfitError("")


def _fit_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    raise UnfitError("true or false is needed")


def _fit_number(value: Any, kind: type) -> int | float:
    unfit = UnfitError("a whole number is needed" if kind is int else "a number is needed")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise unfit
    try:
        number = float(value)  # PyYAML reads 1e-4 as text: it wants 1.0e-4
    except ValueError:
        raise unfit from None
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise unfit
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    if kind is float and not whole:
        return number
    return value if isinstance(value, int) else int(number)  # `save_steps: 10` stays 10 in what is written


def _fit_mapping(value: Any) -> dict:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UnfitError("it starts as a mapping but is not one, as '{key: value}' is", inside=True) from None
    if not isinstance(value, dict):
        raise UnfitError("a mapping is needed")
    return value


def _fit_list(value: Any, kind: Any) -> list:
    if isinstance(value, dict):
        raise UnfitError("a list is needed")
    if not isinstance(value, list):
        return [fit(value, kind)]
    found = []
    for number, item in enumerate(value, start=1):
        try:
            found.append(fit(item, kind))
        except UnfitError as error:
            raise UnfitError(f"entry {number} does not fit: {error}", inside=True) from None
    return found


def _fit_fields(value: dict, kind: type) -> dict:
    """A mapping with the fields of a dataclass, such as an entry of `datasets:`."""
    hints, found = get_type_hints(kind), {}
    for key, item in value.items():
        if key not in hints:
            raise UnfitError(f"`{key}` is not a key there{nearest(str(key), hints)}", inside=True)
        try:
            found[key] = fit(item, hints[key])
        except UnfitError as error:
            raise UnfitError(f"of `{key}`, {error}", inside=True) from None
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in found:
            raise UnfitError(f"the key `{item.name}` is missing there", inside=True)
    return found


def _needed(members: list[Any], choices: Iterable[Any] | None, given: str = "") -> str:
    """What a field takes, as a clause."""
    for member in members:
        if choices is None and isinstance(member, type) and issubclass(member, Enum):
            choices = [item.value for item in member]
    if choices is not None:
        allowed = [str(choice) for choice in choices]
        if len(allowed) <= 12:
            return f"it must be one of {', '.join(allowed)}"
        return f"it is none of its {len(allowed)} choices{nearest(given, allowed)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    shown = []
    for member in members:
        origin = get_origin(member) or member
        if origin is Literal:
            shown.append(" or ".join(map(repr, get_args(member))))
        elif origin is not type(None):
            shown.append(names.get(origin, "a list" if origin is list else "an object that only Python can give"))
    return f"{' or '.join(dict.fromkeys(shown))} is needed"
