"""The two figures of a report: attack success by attack, and success against what the model is still good for."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .reading import Measure, ModelResult, Results

# Okabe and Ito's colour-blind-safe palette (2008) without its yellow and black, which vanish on white and on dark.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_HATCHES = ("", "////", "....", "xxxx")  # colours come round after seven models; the hatch then tells them apart
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH = 4.8  # inches: narrow enough that the labels stay legible when a phone scales the figure to 400 pixels


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink."""

    paper: str
    ink: str
    faint: str
    grid: str


THEMES = {
    "light": Theme(paper="#ffffff", ink="#1b1f24", faint="#59636e", grid="#d9dee3"),
    "dark": Theme(paper="#161b22", ink="#e6edf3", faint="#9da7b1", grid="#343b44"),
}


def draw_success(results: Results, theme: Theme = THEMES["light"]) -> Figure:
    """
    Horizontal bars of attack success, one group an attack, one bar a model, with interval and value.

    The bars lie down because attacks have long names: they stand above their group, and the scale has the full width.
    """
    names, models = results.attack_names, results.models
    heights = [1.0 + len(models) for _ in names]
    figure = _figure(0.24 * (sum(heights) + 0.5 * len(names)) + 0.62 + _legend_height(models), theme)
    axes = figure.add_subplot()
    y = 0.0
    for name in names:
        heading = textwrap.shorten(name, 48, placeholder=" ...")
        axes.text(0, y, heading, color=theme.ink, weight="bold", va="center", parse_math=False)
        for position, model in enumerate(models):
            y += 1.0
            _draw_bar(axes, y, position, model, name, theme)
        y += 1.5
    axes.set_ylim(y - 0.75, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(True)
    _scale(axes, "x", "attack success (lower is safer)", theme)
    handles = [
        Patch(facecolor=_colour(i), hatch=_hatch(i), edgecolor=theme.paper, label=_legend_label(model))
        for i, model in enumerate(models)
    ]
    _legend(figure, handles, theme)
    return figure


def draw_trade_off(results: Results, theme: Theme = THEMES["light"]) -> Figure | None:
    """
    Mean attack success against utility and against over-refusal, a mark for each model.

    The mean is over [`compared_attacks`], so that every mark averages the same attacks. A model without a value in
    [0, 1] is left out. `None` where nothing remains to be drawn.
    """
    attacks = compared_attacks(results)
    panels = [
        ("utility", "utility (higher is better)", [model.utility for model in results.models]),
        ("over_refusal", "over-refusal (lower is better)", [model.over_refusal for model in results.models]),
    ]
    panels = [panel for panel in panels if any(_drawable(measure) for measure in panel[2])]
    drawn = [(i, model) for i, model in enumerate(results.models) if mean_success(model, attacks) is not None]
    if not panels or not drawn:
        return None
    models = [model for _, model in drawn]
    figure = _figure(2.75 * len(panels) + 0.3 + _legend_height(models), theme)
    for row, (_, label, measures) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        for i, model in drawn:
            _draw_mark(axes, i, mean_success(model, attacks), measures[i], theme)
        last = row == len(panels) - 1
        _scale(axes, "x", "mean attack success (lower is safer)" if last else "", theme)
        _scale(axes, "y", label, theme)
    handles = [
        Line2D([], [], color=_colour(i), marker=_marker(i), linestyle="", markersize=8, label=_legend_label(model))
        for i, model in drawn
    ]
    _legend(figure, handles, theme)
    return figure


def compared_attacks(results: Results) -> list[str]:
    """
    Attacks that were scored on every model that was attacked at all: those a mean over attacks can compare.

    Plain prompts (class `none`) are no attack and are left out, unless there is nothing else.
    """
    scored = [
        {name for name, attack in model.attacks.items() if attack.success is not None} for model in results.models
    ]
    scored = [names for names in scored if names]
    shared = [name for name in results.attack_names if scored and all(name in names for names in scored)]
    kinds = {name: attack.kind for model in results.models for name, attack in model.attacks.items()}
    return [name for name in shared if kinds[name] != "none"] or shared


def mean_success(model: ModelResult, attacks: Sequence[str]) -> float | None:
    """Mean success over `attacks`, or `None` where one of them has no score on this model."""
    values = [model.attacks[name].success for name in attacks if name in model.attacks]
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored and len(scored) == len(attacks) else None


def encode(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """The figure as the bytes of a file, the same bytes every time."""
    stream = io.BytesIO()
    # The date and random ids in an SVG would make every build of the same report a different file.
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "trl_robust"}):
        figure.savefig(stream, format=form, dpi=160, metadata=metadata, facecolor=figure.get_facecolor())
    return stream.getvalue()


def _figure(height: float, theme: Theme) -> Figure:
    # Figure and canvas by hand: pyplot would keep global state and pick a backend that may need a display.
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def _draw_bar(axes: Axes, y: float, position: int, model: ModelResult, name: str, theme: Theme) -> None:
    attack = model.attacks.get(name)
    if attack is None or attack.success is None:
        # An empty place would read as zero.
        axes.text(0.01, y, "not run" if attack is None else "no score", color=theme.faint, size=8, va="center")
        return
    axes.barh(
        y,
        attack.success,
        height=0.82,
        color=_colour(position),
        hatch=_hatch(position),
        edgecolor=theme.paper,
        zorder=2,
    )
    if attack.interval is not None:
        errors = [[max(0.0, attack.success - attack.interval[0])], [max(0.0, attack.interval[1] - attack.success)]]
        axes.errorbar(attack.success, y, xerr=errors, color=theme.ink, linewidth=1.1, capsize=2.5, zorder=3)
    axes.text(1.02, y, f"{attack.success:.2f}", color=theme.ink, size=8.5, va="center", clip_on=False)


def _draw_mark(axes: Axes, i: int, success: float | None, measure: Measure | None, theme: Theme) -> None:
    if success is None or measure is None or measure.value is None or not _drawable(measure):
        return
    if measure.interval is not None:
        low, high = measure.interval
        errors = [[max(0.0, measure.value - low)], [max(0.0, high - measure.value)]]
        axes.errorbar(success, measure.value, yerr=errors, color=theme.faint, linewidth=1.1, capsize=2.5, zorder=2)
    # Not clipped: the marks that matter most lie on the edges of the scale.
    axes.plot(
        success, measure.value, _marker(i), color=_colour(i), markersize=9, alpha=0.9,
        markeredgecolor=theme.paper, clip_on=False, zorder=3,
    )  # fmt: skip


def _drawable(measure: Measure | None) -> bool:
    return measure is not None and measure.value is not None and 0 <= measure.value <= 1


def _scale(axes: Axes, which: Literal["x", "y"], label: str, theme: Theme) -> None:
    """The scale 0 to 1 with its grid and label, and the frame's colours."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}lim": (0, 1)})
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_label_text(label, color=theme.ink)
    axes.grid(axis=which, color=theme.grid, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_facecolor(theme.paper)
    axes.tick_params(axis=which, colors=theme.ink, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _marker(i: int) -> str:
    # One step further each time the colours come round, so that no two of the first 49 models look the same.
    return _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]


def _hatch(i: int) -> str:
    return _HATCHES[i // len(_COLOURS) % len(_HATCHES)]


def _legend_label(model: ModelResult) -> str:
    label = f"{model.name}: {model.description}" if model.description else model.name
    label = textwrap.shorten(label, 54, placeholder=" ...").replace("$", r"\$")  # a bare "$" would start mathematics
    return f" {label}" if label.startswith("_") else label  # legends leave out what starts with an underscore


def _legend_height(models: Sequence[ModelResult]) -> float:
    return 0.2 * len(models) + 0.15


def _legend(figure: Figure, handles: Sequence[Patch | Line2D], theme: Theme) -> None:
    if handles:
        figure.legend(
            handles=list(handles), loc="outside upper left", frameon=False, labelcolor=theme.ink, fontsize=9,
            borderaxespad=0.2, labelspacing=0.35,
        )  # fmt: skip
