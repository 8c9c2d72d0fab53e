"""Figures of every report: attack success by attack, and success against what the model is still good for."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .reading import Measure, ModelResult, Results

# Okabe and Ito's colour-blind-safe palette (2008) without its yellow and black, which vanish on white and on dark.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_HATCHES = ("", "////", "....", "xxxx")  # colours come round after seven models; the hatch then tells them apart
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
WIDTH = 4.1  # inches: 9 points are then 11 pixels where a phone scales the figure to 370 pixels
SMALL = 9.0  # points: no text is smaller


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
    figure = new_figure(0.24 * (sum(heights) + 0.5 * len(names)) + 0.62 + legend_height(len(models)), theme)
    axes = figure.add_subplot()
    y = 0.0
    for name in names:
        heading = shortened(name, 44)
        axes.text(0, y, heading, color=theme.ink, weight="bold", va="center", parse_math=False)
        for position, model in enumerate(models):
            y += 1.0
            _draw_bar(axes, y, position, model, name, theme)
        y += 1.5
    axes.set_ylim(y - 0.75, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(True)
    share_scale(axes, "x", "attack success (lower is safer)", theme)
    handles = [
        Patch(facecolor=colour_of(i), hatch=_hatch(i), edgecolor=theme.paper, label=legend_label(model))
        for i, model in enumerate(models)
    ]
    add_legend(figure, handles, theme)
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
    figure = new_figure(2.75 * len(panels) + 0.3 + legend_height(len(models)), theme)
    for row, (_, label, measures) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1)
        for i, model in drawn:
            _draw_mark(axes, i, mean_success(model, attacks), measures[i], theme)
        last = row == len(panels) - 1
        share_scale(axes, "x", "mean attack success (lower is safer)" if last else "", theme)
        share_scale(axes, "y", label, theme)
    handles = [
        Line2D([], [], color=colour_of(i), marker=marker_of(i), linestyle="", markersize=8, label=legend_label(model))
        for i, model in drawn
    ]
    add_legend(figure, handles, theme)
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
    _settle(figure)
    stream = io.BytesIO()
    # The date and random ids in an SVG would make every build of the same report a different file.
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "trl_robust"}):
        figure.savefig(stream, format=form, dpi=160, metadata=metadata, facecolor=figure.get_facecolor())
    return stream.getvalue()


def _settle(figure: Figure) -> None:
    """
    Lays a figure out for good, on places of six digits.

    The layout's solver goes by addresses in memory, so that the last digits of a place differ from run to run, and
    with them the ids in an SVG, which are hashes of places.
    """
    engine = figure.get_layout_engine()
    if not isinstance(engine, ConstrainedLayoutEngine):
        return
    engine.execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(value, 6) for value in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((round(x, 6), round(y, 6)))


def new_figure(height: float, theme: Theme, columns: int = 1) -> Figure:
    """An empty figure of so many inches; `columns` makes one for a wide screen."""
    # Figure and canvas by hand: pyplot would keep global state and pick a backend that may need a display.
    figure = Figure(figsize=(WIDTH * columns, height), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def _draw_bar(axes: Axes, y: float, position: int, model: ModelResult, name: str, theme: Theme) -> None:
    attack = model.attacks.get(name)
    if attack is None or attack.success is None:
        # An empty place would read as zero.
        axes.text(0.01, y, "not run" if attack is None else "no score", color=theme.faint, size=SMALL, va="center")
        return
    axes.barh(
        y,
        attack.success,
        height=0.82,
        color=colour_of(position),
        hatch=_hatch(position),
        edgecolor=theme.paper,
        zorder=2,
    )
    if attack.interval is not None:
        errors = [[max(0.0, attack.success - attack.interval[0])], [max(0.0, attack.interval[1] - attack.success)]]
        axes.errorbar(attack.success, y, xerr=errors, color=theme.ink, linewidth=1.1, capsize=2.5, zorder=3)
    axes.text(1.02, y, f"{attack.success:.2f}", color=theme.ink, size=SMALL, va="center", clip_on=False)


def _draw_mark(axes: Axes, i: int, success: float | None, measure: Measure | None, theme: Theme) -> None:
    if success is None or measure is None or measure.value is None or not _drawable(measure):
        return
    if measure.interval is not None:
        low, high = measure.interval
        errors = [[max(0.0, measure.value - low)], [max(0.0, high - measure.value)]]
        axes.errorbar(success, measure.value, yerr=errors, color=theme.faint, linewidth=1.1, capsize=2.5, zorder=2)
    # Not clipped: the marks that matter most lie on the edges of the scale.
    axes.plot(
        success, measure.value, marker_of(i), color=colour_of(i), markersize=9, alpha=0.9,
        markeredgecolor=theme.paper, clip_on=False, zorder=3,
    )  # fmt: skip


def _drawable(measure: Measure | None) -> bool:
    return measure is not None and measure.value is not None and 0 <= measure.value <= 1


def share_scale(axes: Axes, which: Literal["x", "y"], label: str, theme: Theme) -> None:
    """The scale 0 to 1 with its grid and label, and the frame's colours."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}lim": (0, 1)})
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_label_text(label, color=theme.ink, size=SMALL)
    axes.grid(axis=which, color=theme.grid, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_facecolor(theme.paper)
    axes.tick_params(axis=which, colors=theme.ink, length=0, labelsize=SMALL)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def colour_of(i: int) -> str:
    """Colour of the model at place `i`."""
    return _COLOURS[i % len(_COLOURS)]


def marker_of(i: int) -> str:
    """Marker of the model at place `i`."""
    # One step further each time the colours come round, so that no two of the first 49 models look the same.
    return _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]


def dash_of(i: int) -> Literal["-", "--", ":", "-."]:
    """Dashes of the line of the model at place `i`, which tell lines of one colour apart."""
    return _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _hatch(i: int) -> str:
    return _HATCHES[i // len(_COLOURS) % len(_HATCHES)]


def legend_label(model: ModelResult) -> str:
    """A model's name and description, as far as there is room for them."""
    label = f"{model.name}: {model.description}" if model.description else model.name
    return legend_text(shortened(label, 46))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; what is left out is marked."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    head, _, rest = text[: most - 4].rpartition(" ")
    # Between words, unless the last of them is most of the text.
    return f"{head} ..." if len(rest) < most / 2 and head else f"{text[: most - 4]} ..."


def legend_text(text: str) -> str:
    """Text that a legend shows as it is."""
    text = text.replace("$", r"\$")  # a bare "$" would start mathematics
    return f" {text}" if text.startswith("_") else text  # legends leave out what starts with an underscore


def legend_height(num_entries: int, columns: int = 1) -> float:
    """Height of a legend in inches."""
    return 0.2 * math.ceil(num_entries / columns) + 0.15


def add_legend(figure: Figure, handles: Sequence[Patch | Line2D], theme: Theme, columns: int = 1) -> None:
    """Puts a legend above the panels."""
    if handles:
        figure.legend(
            handles=list(handles), loc="outside upper left", frameon=False, labelcolor=theme.ink, fontsize=SMALL,
            borderaxespad=0.2, labelspacing=0.35, ncols=columns,
        )  # fmt: skip
