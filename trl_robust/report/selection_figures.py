"""The figures of a selection: spread of scores and weights, what is kept of every source, how often rows were seen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import THEMES, Theme

# Of the colour-blind-safe palette of Okabe and Ito (2008), as in the report's other figures.
KEPT, LABELLED = "#0072B2", "#D55E00"
_WIDTH = 4.8  # inches, as the report's other figures
MOST_SOURCES = 30


def draw_scores(summary: Mapping[str, Any], theme: Theme = THEMES["light"]) -> Figure | None:
    """
    Histograms of scores and of weights: rows that are kept on rows that are not, and a line for those with the label.

    Args:
        summary (`Mapping`):
            `selection.json`.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.

    Returns:
        `Figure`, or `None` where there is no histogram.
    """
    found = summary.get("histograms") or {}
    labels = {"score": "score, less the mean", "weight": "weight (mean 1)"}
    ends = {"score": summary.get("threshold_score"), "weight": summary.get("threshold")}
    panels = [name for name in labels if found.get(name)]
    if not panels:
        return None
    figure = _figure(2.1 * len(panels) + 0.5, theme)
    for number, name in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        edges, counts = found[name]["edges"], found[name]["counts"]
        dropped = [all_ - kept for all_, kept in zip(counts["all"], counts["kept"], strict=True)]
        widths = [high - low for low, high in pairwise(edges)]
        options: dict[str, Any] = {"align": "edge", "edgecolor": theme.paper, "linewidth": 0.4}
        axes.bar(edges[:-1], counts["kept"], widths, color=KEPT, label="kept", **options)
        axes.bar(edges[:-1], dropped, widths, bottom=counts["kept"], color=theme.faint, label="not kept", **options)
        if "labelled" in counts:
            axes.stairs(
                counts["labelled"], edges, color=LABELLED, linewidth=1.6, label=f"with {_label(summary)}", zorder=3
            )
        if (end := ends[name]) is not None:
            axes.axvline(end, color=theme.ink, linewidth=1, linestyle="--", label="last row kept", zorder=4)
        axes.set_xlabel(labels[name], color=theme.ink)
        axes.set_ylabel("rows", color=theme.ink)
        _style(axes, "y", theme)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, labelcolor=theme.ink, fontsize=8, loc="outside upper left", ncols=2)
    return figure


def draw_sources(summary: Mapping[str, Any], theme: Theme = THEMES["light"]) -> Figure | None:
    """
    The share of every source that is kept, a bar a source.

    Args:
        summary (`Mapping`):
            `selection.json`.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.

    Returns:
        `Figure`, or `None` where no source is told. Of many sources the largest.
    """
    sources = sorted((summary.get("sources") or {}).items(), key=lambda item: -item[1]["rows"])[:MOST_SOURCES]
    if not sources:
        return None
    figure = _figure(0.46 * len(sources) + 0.75, theme)
    axes = figure.add_subplot()
    for place, (name, found) in enumerate(sources):
        axes.barh(place, found["keep_rate"], height=0.42, color=KEPT, zorder=2)
        text = textwrap.shorten(f"{name}: {found['kept']} of {found['rows']}", 60, placeholder=" ...")
        axes.text(0, place - 0.4, text, color=theme.ink, size=8.5, va="center", parse_math=False)
        axes.text(1.02, place, f"{found['keep_rate']:.2f}", color=theme.ink, size=8.5, va="center", clip_on=False)
    axes.set_ylim(len(sources) - 0.5, -0.75)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel("share that is kept", color=theme.ink)
    _style(axes, "x", theme)
    return figure


def draw_visits(summary: Mapping[str, Any], theme: Theme = THEMES["light"]) -> Figure | None:
    """
    How many rows were visited how often.

    Args:
        summary (`Mapping`):
            `selection.json`.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.

    Returns:
        `Figure`, or `None` where nothing is told, or all rows were visited equally often.
    """
    visits = summary.get("visits")
    if not visits or visits["min"] == visits["max"]:
        return None
    figure = _figure(2.1, theme)
    axes = figure.add_subplot()
    starts, counts = zip(*visits["counts"], strict=True)
    axes.bar(starts, counts, 0.9 * visits["width"], align="center", color=KEPT, zorder=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("visits of a row", color=theme.ink)
    axes.set_ylabel("rows", color=theme.ink)
    _style(axes, "y", theme)
    return figure


def _label(summary: Mapping[str, Any]) -> str:
    column = str((summary.get("labels") or {}).get("column") or "the label")
    return textwrap.shorten(column, 30, placeholder=" ...").replace("$", r"\$")  # a bare "$" would start mathematics


def _figure(height: float, theme: Theme) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, grid: str, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
