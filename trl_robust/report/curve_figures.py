"""Figures of a generalised evaluation: success against budget, by attack, and against site and radius, by model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import (
    SMALL,
    THEMES,
    Theme,
    add_legend,
    colour_of,
    dash_of,
    legend_height,
    legend_label,
    legend_text,
    marker_of,
    new_figure,
    share_scale,
    shortened,
)
from .generalized_reading import CurvePoint, SiteMap
from .reading import AttackResult, ModelResult, Results

CLASSES = {"input": "prompts", "embedding": "embeddings", "latent": "hidden states", "weights": "weights"}
"""Classes of attacks, and what they change."""

INTERVALS = 4
"""Models up to which a curve has the intervals of its points; with more they hide each other, and stand in a table."""

MOST_TICKS = 6
"""Budgets that are written at an axis; labels of more would run into each other."""


def curve_names(results: Results) -> list[str]:
    """Labels of the attacks that have a curve on some model, controls left out."""
    return [name for name in results.attack_names if any(_curve_of(model, name) for model in results.models)]


def draw_curves(results: Results, theme: Theme = THEMES["light"], columns: int = 1) -> Figure | None:
    """
    Attack success against budget: a panel an attack, a line a model.

    The line is the best so far, the marks are what was measured; a cross is a budget that destroyed the model, and in
    no line. Up to four models have the interval of every point. A model's load, what it has to bear, is a grey line
    where it is the same for all models, and otherwise a tick at the top in the model's colour.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.
        columns (`int`, *optional*, defaults to `1`):
            Panels side by side.

    Returns:
        `Figure`, or `None` without curves.
    """
    names = curve_names(results)
    if not names:
        return None
    columns = min(columns, len(names))
    handles = _handles(results, names, theme)
    num_rows = math.ceil(len(names) / columns)
    figure = new_figure(2.1 * num_rows + 0.1 + legend_height(len(handles), columns), theme, columns)
    for number, name in enumerate(names):
        _draw_curve(figure.add_subplot(num_rows, columns, number + 1), name, results.models, theme)
    add_legend(figure, handles, theme, columns)
    return figure


def _handles(results: Results, names: Sequence[str], theme: Theme) -> list[Line2D]:
    handles = [
        Line2D(
            [], [], color=colour_of(i), marker=marker_of(i), linestyle=dash_of(i), markersize=6, linewidth=1.6,
            label=legend_label(model),
        )
        for i, model in enumerate(results.models)
    ]  # fmt: skip
    if any(point.destroyed for model in results.models for name in names for point in _curve_of(model, name)):
        handles.append(
            Line2D([], [], color=theme.ink, marker="x", linestyle="", markersize=6, label="destroyed the model")
        )
    if any(_loads_of(results.models, name) for name in names):
        handles.append(Line2D([], [], color=theme.faint, linestyle=(0, (4, 2)), linewidth=1.2, label="load"))
    return handles


def _draw_curve(axes: Axes, name: str, models: Sequence[ModelResult], theme: Theme) -> None:
    for i, model in enumerate(models):
        points = _curve_of(model, name)
        best = [(point.budget, point.best) for point in points if point.best is not None]
        if best:
            axes.plot(
                *zip(*best, strict=True), color=colour_of(i), linestyle=dash_of(i), linewidth=1.6, alpha=0.85, zorder=2
            )
        for point in points:
            if point.success is not None:
                _draw_point(axes, point, point.success, i, len(models) <= INTERVALS)
    loads = _loads_of(models, name)
    _draw_loads(axes, loads, theme)
    axes.set_title(_title(name), loc="left", size=SMALL + 0.5, weight="bold", color=theme.ink)
    share_scale(axes, "y", "success", theme)
    budgets = sorted({point.budget for model in models for point in _curve_of(model, name)})
    _budget_scale(axes, budgets, [*budgets, *loads.values()])
    axes.tick_params(axis="x", colors=theme.ink, length=0, labelsize=SMALL)
    unit = next((model.attacks[name].axis for model in models if name in model.attacks), "")
    axes.set_xlabel(unit, color=theme.ink, size=SMALL)


def _draw_point(axes: Axes, point: CurvePoint, success: float, i: int, with_interval: bool) -> None:
    axes.plot(
        point.budget, success, "x" if point.destroyed else marker_of(i), color=colour_of(i), clip_on=False, zorder=3,
        markersize=6 if point.destroyed else 4.5, markeredgewidth=1.4 if point.destroyed else 0.6, alpha=0.9,
    )  # fmt: skip
    if point.interval is not None and with_interval:
        errors = [[max(0.0, success - point.interval[0])], [max(0.0, point.interval[1] - success)]]
        axes.errorbar(
            point.budget, success, yerr=errors, color=colour_of(i), linewidth=0.9, capsize=2, alpha=0.6, clip_on=False
        )


def _loads_of(models: Sequence[ModelResult], name: str) -> dict[int, float]:
    """Load by place of the model."""
    found = {}
    for i, model in enumerate(models):
        for row in model.resistances:
            if row.attack == name and row.load is not None and row.load > 0:
                found[i] = row.load
    return found


def _draw_loads(axes: Axes, loads: dict[int, float], theme: Theme) -> None:
    if len(set(loads.values())) == 1:
        axes.axvline(next(iter(loads.values())), color=theme.faint, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1)
        return
    for i, load in loads.items():
        axes.axvline(load, ymin=0.88, color=colour_of(i), linestyle=(0, (4, 2)), linewidth=1.6, zorder=1)


def _budget_scale(axes: Axes, budgets: Sequence[float], marked: Sequence[float]) -> None:
    """A logarithmic scale where what is marked spans most of a decade; symmetrical about zero where zero is in it."""
    positive = [value for value in marked if value > 0]
    if positive and max(positive) / min(positive) >= 8:
        if min(budgets) > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_xticks(_spread(budgets), [f"{budget:g}" for budget in _spread(budgets)])
    axes.minorticks_off()


def _spread(budgets: Sequence[float]) -> list[float]:
    """Budgets whose labels do not run into each other, evenly chosen."""
    if len(budgets) <= MOST_TICKS:
        return list(budgets)
    step = (len(budgets) - 1) / (MOST_TICKS - 1)
    return [budgets[round(i * step)] for i in range(MOST_TICKS)]


def draw_maps(results: Results, theme: Theme = THEMES["light"], columns: int = 1) -> Figure | None:
    """
    Success of latent attacks at single sites: a panel a model, sites downwards, radii to the right, values as text.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.
        columns (`int`, *optional*, defaults to `1`):
            Panels side by side.

    Returns:
        `Figure`, or `None` where no model has a map.
    """
    found = [(model.name, model.site_map) for model in results.models if model.site_map is not None]
    if not found:
        return None
    columns = min(columns, len(found))
    rows = [found[start : start + columns] for start in range(0, len(found), columns)]
    heights = [max(0.3 * len(one.sites) + 0.7 for _, one in row) for row in rows]
    figure = new_figure(sum(heights) + 0.25, theme, columns)
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for number, (name, one) in enumerate(found):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        _draw_map(axes, name, one, theme)
    figure.supxlabel("radius, relative to the usual norm", color=theme.ink, size=SMALL)
    return figure


def _draw_map(axes: Axes, name: str, found: SiteMap, theme: Theme) -> None:
    colours = LinearSegmentedColormap.from_list("success", [theme.paper, "#0072B2"])
    values = [[math.nan if value is None else value for value in line] for line in found.success]
    axes.set_facecolor(theme.paper)
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(found.success):
        for x, value in enumerate(line):
            text = "-" if value is None else f"{value:.2f}"
            ink = _ink_on(theme.paper if value is None else colours(value))
            axes.text(x, y, text, ha="center", va="center", size=SMALL, color=ink)
    sites = [legend_text(shortened(site, 12)) for site in found.sites]
    axes.set_yticks(range(len(sites)), sites, size=SMALL, color=theme.ink)
    axes.set_xticks(range(len(found.radii)), [f"{radius:g}" for radius in found.radii], size=SMALL, color=theme.ink)
    axes.tick_params(length=0)
    axes.set_title(_title(name), loc="left", size=SMALL + 0.5, weight="bold", color=theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)


def _ink_on(colour: Any) -> str:
    """Black or white, whichever stands out more (WCAG's relative luminance)."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    luminance = sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _title(name: str) -> str:
    return shortened(name, 44).replace("$", r"\$")


def strongest(results: Results) -> Results:
    """
    The same models with the strongest attack of every class in place of all attacks, so that a figure stays small.

    A class stands under what it changes ("prompts", "hidden states"); plain requests stay.

    Args:
        results ([`~trl_robust.report.reading.Results`]):
            Results.

    Returns:
        [`~trl_robust.report.reading.Results`].
    """
    models = []
    for model in results.models:
        attacks: dict[str, AttackResult] = {
            name: attack for name, attack in model.attacks.items() if attack.kind == "none" and not attack.control_of
        }
        for kind, changed in CLASSES.items():
            best = worst_of_class(model, kind)
            if best is not None:
                attacks[f"strongest attack on {changed}"] = best
        models.append(replace(model, attacks=attacks))
    return replace(results, models=models)


def worst_of_class(model: ModelResult, kind: str) -> AttackResult | None:
    """The attack of a class that succeeds most often on a model, controls left out; `None` without one that scored."""
    scored = [
        attack
        for attack in model.attacks.values()
        if attack.kind == kind and not attack.control_of and attack.success is not None
    ]
    return max(scored, key=lambda attack: attack.success or 0.0, default=None)


def _curve_of(model: ModelResult, name: str) -> Sequence[CurvePoint]:
    return model.attacks[name].curve if name in model.attacks else ()
