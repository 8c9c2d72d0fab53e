"""What a generalised evaluation adds to `results.json`, as typed records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    agreement: float | None = None
    kappa: float | None = None
    n: int = 0


@dataclass(frozen=True)
class SiteMap:
    """Success of latent attacks: `success` has a row for every site and a column for every radius."""

    sites: Sequence[str]
    radii: Sequence[float]
    success: Sequence[Sequence[float | None]]
    n: int = 0


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
                judge=name,
                success=_share(row.get("success"), f"{place}: success"),
                interval=interval_of(row.get("interval"), place),
                agreement=number_of(agreement.get("agreement"), f"{place}: agreement"),
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


def _share(value: object, where: str) -> float | None:
    found = number_of(value, where)
    if found is not None and not 0 <= found <= 1:
        raise ValueError(f"{where} is {found}; it must lie in [0, 1].")
    return found
