"""Figures of a generalised evaluation: success against budget, by attack, and against site and radius, by model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figures import THEMES, Theme, _colour, _figure, _legend, _legend_height, _legend_label, _marker, _scale
from .reading import AttackResult, ModelResult, Results

CLASSES = {"input": "prompts", "embedding": "embeddings", "latent": "hidden states", "weights": "weights"}
"""Classes of attacks, and what they change."""

INTERVALS = 4
"""Models up to which a curve has the intervals of its points; with more they hide each other, and stand in a table."""


def curve_names(results: Results) -> list[str]:
    """Labels of the attacks that have a curve on some model, controls left out."""
    return [name for name in results.attack_names if any(_curve_of(model, name) for model in results.models)]


def draw_curves(results: Results, theme: Theme = THEMES["light"]) -> Figure | None:
    """
    Attack success against budget: a panel an attack, a line a model.

    The line is the best so far, the marks are what was measured; a hollow cross is a budget that destroyed the model,
    and in no line. Up to four models have the interval of every point. `None` without curves.
    """
    names = curve_names(results)
    if not names:
        return None
    figure = _figure(2.1 * len(names) + 0.4 + _legend_height(results.models), theme)
    for row, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, row + 1)
        _draw_curve(axes, name, results.models, theme)
    handles = [
        Line2D([], [], color=_colour(i), marker=_marker(i), markersize=6, linewidth=1.6, label=_legend_label(model))
        for i, model in enumerate(results.models)
    ]
    _legend(figure, handles, theme)
    return figure


def _draw_curve(axes: Axes, name: str, models: Sequence[ModelResult], theme: Theme) -> None:
    budgets = sorted({point.budget for model in models for point in _curve_of(model, name)})
    for i, model in enumerate(models):
        points = _curve_of(model, name)
        best = [(point.budget, point.best) for point in points if point.best is not None]
        if best:
            axes.plot(*zip(*best, strict=True), color=_colour(i), linewidth=1.6, alpha=0.85, zorder=2)
        for point in points:
            if point.success is None:
                continue
            axes.plot(
                point.budget,
                point.success,
                "x" if point.destroyed else _marker(i),
                color=_colour(i),
                markersize=4.5,
                clip_on=False,
                zorder=3,
                alpha=0.6 if point.destroyed else 0.9,
            )
            if point.interval is not None and len(models) <= INTERVALS:
                errors = [
                    [max(0.0, point.success - point.interval[0])],
                    [max(0.0, point.interval[1] - point.success)],
                ]
                axes.errorbar(
                    point.budget, point.success, yerr=errors, color=_colour(i), linewidth=0.9, capsize=2, alpha=0.6
                )
    axes.set_title(
        textwrap.shorten(name, 48, placeholder=" ..."), loc="left", size=9.5, weight="bold", color=theme.ink
    )
    _scale(axes, "y", "success", theme)
    axes.tick_params(axis="x", colors=theme.ink, length=0)
    positive = [budget for budget in budgets if budget > 0]
    if len(positive) > 1 and positive[-1] / positive[0] >= 8:
        axes.set_xscale("log") if len(positive) == len(budgets) else axes.set_xscale("symlog", linthresh=positive[0])
    axes.set_xticks(_spread(budgets), [f"{budget:g}" for budget in _spread(budgets)])
    axes.minorticks_off()
    unit = next((model.attacks[name].axis for model in models if name in model.attacks), "")
    axes.set_xlabel(unit, color=theme.ink, size=8.5)


def _spread(budgets: Sequence[float]) -> list[float]:
    """Budgets whose labels do not run into each other: at most six, evenly chosen."""
    if len(budgets) <= 6:
        return list(budgets)
    step = (len(budgets) - 1) / 5
    return [budgets[round(i * step)] for i in range(6)]


def draw_maps(results: Results, theme: Theme = THEMES["light"]) -> Figure | None:
    """
    Success of latent attacks at single sites: a panel a model, sites downwards, radii to the right, values as text.

    `None` where no model has a map.
    """
    models = [model for model in results.models if model.site_map is not None]
    if not models:
        return None
    heights = [0.32 * len(model.site_map.sites) + 0.75 for model in models if model.site_map is not None]
    figure = _figure(sum(heights) + 0.2, theme)
    grid = figure.add_gridspec(len(models), 1, height_ratios=heights)
    colours = LinearSegmentedColormap.from_list("success", [theme.paper, "#0072B2"])
    for row, model in enumerate(models):
        found = model.site_map
        assert found is not None
        axes = figure.add_subplot(grid[row, 0])
        values = [[math.nan if value is None else value for value in line] for line in found.success]
        axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for y, line in enumerate(found.success):
            for x, value in enumerate(line):
                text = "-" if value is None else f"{value:.2f}"
                ink = "#ffffff" if value is not None and value > 0.5 else theme.ink
                axes.text(x, y, text, ha="center", va="center", size=8.5, color=ink)
        axes.set_yticks(range(len(found.sites)), found.sites, size=8.5, color=theme.ink)
        axes.set_xticks(range(len(found.radii)), [f"{radius:g}" for radius in found.radii], size=8.5, color=theme.ink)
        axes.tick_params(length=0)
        shown = textwrap.shorten(model.name, 48, placeholder=" ...").replace("$", r"\$")
        axes.set_title(shown, loc="left", size=9.5, weight="bold", color=theme.ink)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if row == len(models) - 1:
            axes.set_xlabel("radius, in multiples of the usual norm of the hidden states", color=theme.ink, size=8.5)
    return figure


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


def _curve_of(model: ModelResult, name: str) -> Sequence:
    return model.attacks[name].curve if name in model.attacks else ()
