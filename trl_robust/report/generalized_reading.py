"""What a generalised evaluation adds to `results.json`, as typed records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .values import Interval, count_of, interval_of, mapping_of, number_of, text_of


@dataclass(frozen=True)
class CurvePoint:
    """Success at one budget. `best` is the best so far, `None` where the model was destroyed or nothing was scored."""

    budget: float
    success: float | None = None
    interval: Interval | None = None
    best: float | None = None
    n_errored: int = 0
    capability: float | None = None
    destroyed: bool = False


@dataclass(frozen=True)
class SecondJudge:
    """What another judge says of the same answers, and how far it agrees with the first."""

    judge: str
    success: float | None = None
    interval: Interval | None = None
    n_errored: int = 0
    agreement: float | None = None
    agreement_interval: Interval | None = None
    kappa: float | None = None
    n: int = 0


@dataclass(frozen=True)
class SiteMap:
    """Success of latent attacks: `success` has a row for every site and a column for every radius."""

    sites: Sequence[str]
    radii: Sequence[float]
    success: Sequence[Sequence[float | None]]
    n: int = 0


@dataclass(frozen=True)
class ResistanceRow:
    """
    Resistance to an attack at a threshold, and the factor of safety.

    `resistance` is `None` where no budget up to `censored_at` reached the threshold; an end of an interval is infinite
    where it lies beyond the largest budget.
    """

    attack: str
    threshold: float
    unit: str = ""
    resistance: float | None = None
    censored_at: float | None = None
    interval: Interval | None = None
    load: float | None = None
    load_is: str = ""
    factor: float | None = None
    factor_above: float | None = None
    n_destroyed: int = 0


@dataclass(frozen=True)
class Load:
    """What a model has to bear under a latent attack, measured on `measured_on`."""

    load: float | None = None
    interval: Interval | None = None
    site: str = ""
    load_is: str = ""
    measured_on: str = ""
    n: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number over models with its interval; where there is none, `why` says so."""

    value: float | None = None
    interval: Interval | None = None
    p: float | None = None
    baseline: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Study:
    """How far one generalised measure tells how attacks on prompts fare."""

    of: str
    largest: Estimate
    mean: Estimate
    prediction: Estimate
    prediction_of_new_models: Estimate
    conservative: Estimate
    n: int = 0
    note: str = ""


def curve_of(content: object, where: str) -> list[CurvePoint]:
    """
    Points of an attack's curve.

    Args:
        content (`list`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        `list` of [`CurvePoint`].

    Raises:
        `ValueError`: a point without a budget, or a value that is none.
    """
    if content is None:
        return []
    if not isinstance(content, list):
        raise ValueError(f"{where}: curve is {content!r}; it must be a list of points.")
    points = []
    for number, row in enumerate(content):
        place = f"{where}, point {number} of the curve"
        budget = number_of(mapping_of(row).get("budget"), f"{place}: budget")
        if budget is None:
            raise ValueError(f"{place} has no budget.")
        points.append(
            CurvePoint(
                budget=budget,
                success=_share(row.get("success"), f"{place}: success"),
                interval=interval_of(row.get("interval"), place),
                best=_share(row.get("best"), f"{place}: best"),
                n_errored=count_of(row.get("n_errored"), f"{place}: n_errored"),
                capability=number_of(row.get("capability"), f"{place}: capability"),
                destroyed=row.get("destroyed") is True,
            )
        )
    return points


def second_judges_of(content: object, where: str) -> list[SecondJudge]:
    """
    Further judges of an attack.

    Args:
        content (`list`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        `list` of [`SecondJudge`].
    """
    found = []
    for row in content if isinstance(content, list) else []:
        if not isinstance(row, Mapping):
            continue
        agreement, name = mapping_of(row.get("agreement")), text_of(row.get("judge"))
        place = f"{where}, judge {name}"
        found.append(
            SecondJudge(
                judge=name + (f" v{version}" if (version := text_of(row.get("judge_version"))) else ""),
                success=_share(row.get("success"), f"{place}: success"),
                interval=interval_of(row.get("interval"), place),
                n_errored=count_of(row.get("n_errored"), f"{place}: n_errored"),
                agreement=number_of(agreement.get("agreement"), f"{place}: agreement"),
                agreement_interval=interval_of(agreement.get("interval"), place),
                kappa=number_of(agreement.get("kappa"), f"{place}: kappa"),
                n=count_of(agreement.get("n"), f"{place}: n"),
            )
        )
    return found


def site_map_of(content: object, where: str) -> SiteMap | None:
    """
    A model's map of site and radius.

    Args:
        content (`dict`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        [`SiteMap`], or `None` without one.

    Raises:
        `ValueError`: rows and columns that do not fit sites and radii.
    """
    found = mapping_of(content)
    if not found:
        return None
    sites, radii, rows = (found.get(name) for name in ("sites", "radii", "success"))
    if (
        not (isinstance(sites, list) and isinstance(radii, list) and isinstance(rows, list))
        or len(rows) != len(sites)
        or any(not isinstance(row, list) or len(row) != len(radii) for row in rows)
    ):
        raise ValueError(f"{where}: map must have a row of `success` for every site and a value for every radius.")
    place = f"{where}, map"
    return SiteMap(
        sites=[text_of(site) for site in sites],
        radii=[number_of(radius, place) or 0.0 for radius in radii],
        success=[[_share(value, place) for value in row] for row in rows],
        n=count_of(found.get("n"), place),
    )


def resistances_of(content: object, where: str) -> list[ResistanceRow]:
    """
    Rows of a model's `factor_of_safety` that name an attack and a threshold; others are of earlier versions.

    Args:
        content (`list`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        `list` of [`ResistanceRow`].

    Raises:
        `ValueError`: a value that is none.
    """
    found = []
    for row in content if isinstance(content, list) else []:
        if not is_resistance(row):
            continue
        attack = text_of(row.get("attack"))
        place = f"{where}, factor of safety of {attack}"
        numbers: dict[str, Any] = {
            name: number_of(row.get(name), f"{place}: {name}")
            for name in ("resistance", "censored_at", "load", "factor", "factor_above")
        }
        found.append(
            ResistanceRow(
                attack=attack,
                threshold=_share(row.get("threshold"), f"{place}: threshold") or 0.0,
                unit=text_of(row.get("unit")),
                interval=_open_interval(row.get("interval"), place),
                load_is=text_of(row.get("load_is")),
                n_destroyed=count_of(row.get("n_destroyed"), f"{place}: n_destroyed"),
                **numbers,
            )
        )
    return found


def is_resistance(row: object) -> bool:
    """Whether a row of `factor_of_safety` names an attack and a threshold."""
    return isinstance(row, Mapping) and row.get("threshold") is not None and bool(row.get("attack"))


def loads_of(content: object, where: str) -> dict[str, Load]:
    """
    A model's loads by attack.

    Args:
        content (`dict`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        `dict` of [`Load`].

    Raises:
        `ValueError`: a value that is none.
    """
    found = {}
    for attack, row in mapping_of(content).items():
        place, row = f"{where}, load of {attack}", mapping_of(row)
        found[text_of(attack)] = Load(
            load=number_of(row.get("load"), place),
            interval=interval_of(row.get("interval"), place),
            n=count_of(row.get("n"), f"{place}: n"),
            **{name: text_of(row.get(name)) for name in ("site", "load_is", "measured_on")},
        )
    return found


def studies_of(content: object, where: str) -> dict[str, Study]:
    """
    Studies of generalised measures over models.

    Args:
        content (`dict`, *optional*):
            The decoded JSON.
        where (`str`):
            Where it stands, for the messages of errors.

    Returns:
        `dict` of [`Study`] by measure.

    Raises:
        `ValueError`: a value that is none.
    """
    found = {}
    for name, row in mapping_of(content).items():
        place, row = f"{where}, proxy {name}", mapping_of(row)
        correlations = mapping_of(row.get("correlations"))
        found[text_of(name)] = Study(
            of=text_of(row.get("of")),
            largest=_estimate(correlations.get("largest"), "rho", place),
            mean=_estimate(correlations.get("mean"), "rho", place),
            prediction=_estimate(row.get("prediction"), "error", place),
            prediction_of_new_models=_estimate(row.get("prediction_of_new_models"), "error", place),
            conservative=_estimate(row.get("conservative"), "rate", place),
            n=count_of(row.get("n"), f"{place}: n"),
            note=text_of(row.get("note")),
        )
    return found


def _estimate(content: object, name: str, where: str) -> Estimate:
    row = mapping_of(content)
    return Estimate(
        value=number_of(row.get(name), f"{where}: {name}"),
        interval=interval_of(row.get("interval"), where),
        p=number_of(row.get("p"), f"{where}: p"),
        baseline=number_of(row.get("baseline"), f"{where}: baseline"),
        why=text_of(row.get("why")),
    )


def _open_interval(value: object, where: str) -> Interval | None:
    """An interval whose missing ends lie beyond the largest budget: JSON has no infinity."""
    if isinstance(value, list) and len(value) == 2:
        low, high = (math.inf if end is None else number_of(end, f"{where}: interval") for end in value)
        return None if low is None or high is None else (low, high)
    return interval_of(value, where)


def _share(value: object, where: str) -> float | None:
    found = number_of(value, where)
    if found is not None and not 0 <= found <= 1:
        raise ValueError(f"{where} is {found}; it must lie in [0, 1].")
    return found
