"""The Pareto picture: what fails against what the model is still good for, one mark a cell."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.figures import THEMES, encode
from .cells import BEFORE
from .table import MEAN, PRODUCT, headline, worth
from .wordings import AVERAGE

# Of the colour-blind-safe palette of Okabe and Ito (2008), as in the report.
FRONT, OTHER, BASELINE = "#0072B2", "#8C8C8C", "#D55E00"
SIZE = 5.2  # inches, of the square that the marks are in
SPAN = 0.15  # the least that a scale shows
LINES = 24  # of names beside the picture, before it grows
NEAR = 0.02  # share of the axes within which marks share a label


@dataclass(frozen=True)
class Mark:
    """
    A cell in the picture.

    Args:
        number (`int`):
            What stands beside its mark.
        name (`str`):
            The cell, and those that share its runs.
        success (`tuple`):
            Mean attack success, and the ends of its interval; of wordings the share of the questions that some
            wording is the failure of.
        worth (`tuple`):
            Compliance x utility, and the ends of its interval; where neither was measured, average accuracy.
        kind (`str`):
            `before`, `baseline` or `cell`.
    """

    number: int
    name: str
    success: tuple[float, float, float]
    worth: tuple[float, float, float]
    kind: str


def pareto_front(marks: Sequence[Mark]) -> list[Mark]:
    """
    Cells that no other cell beats: with less success of the attacks and no less worth, or more worth and no more
    success.

    Args:
        marks (sequence of [`Mark`]):
            Cells.

    Returns:
        `list` of [`Mark`], by rising success.
    """

    def beaten(mark: Mark) -> bool:
        return any(
            other.success[0] <= mark.success[0]
            and other.worth[0] >= mark.worth[0]
            and (other.success[0], other.worth[0]) != (mark.success[0], mark.worth[0])
            for other in marks
        )

    return sorted((mark for mark in marks if not beaten(mark)), key=lambda mark: (mark.success[0], mark.worth[0]))


def marks_of(table: Mapping[str, Any]) -> list[Mark]:
    """
    The marks of a sweep's cells; cells without a figure for one of the axes have none.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `list` of [`Mark`].
    """
    shared: dict[str, list[str]] = {}
    for cell in table["cells"]:
        if cell.get("same_as"):
            shared.setdefault(cell["same_as"], []).append(cell["name"])
    marks: list[Mark] = []
    for cell in table["cells"]:
        success, good = _failing(table, cell["figures"]), cell["figures"][_worth_key(table)]
        if cell.get("same_as") or success["value"] is None or good["value"] is None:
            continue
        kind = {BEFORE: "before", table["baseline"]: "baseline"}.get(cell["name"], "cell")
        name = " = ".join([cell["name"], *shared.get(cell["name"], [])])
        marks.append(Mark(len(marks), name, _ends(success), _ends(good), kind))
    return marks


def _failing(table: Mapping[str, Any], figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The axis on which less is better."""
    found = figures[headline(table)[0]]
    if headline(table)[0] == MEAN or found["value"] is None:
        return found
    interval = [1 - end for end in found["interval"][::-1]] if found["interval"] else None
    return {**found, "value": 1 - found["value"], "interval": interval}


def _worth_key(table: Mapping[str, Any]) -> str:
    return PRODUCT if worth(table) or not table["wordings"] else AVERAGE


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = estimate["interval"] or (estimate["value"], estimate["value"])
    return estimate["value"], low, high


def draw_pareto(table: Mapping[str, Any]) -> Figure | None:
    """
    Draws the picture.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `matplotlib.figure.Figure`, or `None` where there is nothing to draw.
    """
    marks = marks_of(table) if table["attacks"] or table["wordings"] else []
    if not marks:
        return None
    theme = THEMES["light"]
    lines = [textwrap.shorten(f"{mark.number}  {mark.name}", 62, placeholder=" ...") for mark in marks]
    height = SIZE * max(1.0, len(lines) / LINES)
    figure = Figure(figsize=(SIZE * 1.95, height), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes, side = figure.subplots(1, 2, width_ratios=[1.25, 1])
    front = pareto_front(marks)
    _draw_front(axes, front)
    for mark in marks:
        _draw_mark(axes, mark, mark in front, theme)
    _widen(axes)
    failing = "questions answered wrongly in some wording (lower is better)"
    if table["attacks"]:
        failing = f"mean attack success over {', '.join(table['mean_over'])} (lower is safer)"
    axes.set_xlabel(failing, color=theme.ink)
    axes.set_ylabel(f"{_worth_name(table)} (higher is better)", color=theme.ink)
    axes.grid(color=theme.grid, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.faint)
    _list_names(side, marks, lines, front, theme)
    _label(axes, marks, theme)
    return figure


def _worth_name(table: Mapping[str, Any]) -> str:
    there = [
        name
        for name in worth(table)
        if name != PRODUCT and any(cell["figures"][name]["value"] is not None for cell in table["cells"])
    ]
    return " x ".join(there) or AVERAGE


def _draw_front(axes: Any, front: Sequence[Mark]) -> None:
    """The border of what was reached: steps, since between two cells nothing was tried."""
    xs, ys = [mark.success[0] for mark in front], [mark.worth[0] for mark in front]
    axes.step(xs, ys, where="post", color=FRONT, linewidth=1.2, alpha=0.6, zorder=1)


def _draw_mark(axes: Any, mark: Mark, on_front: bool, theme: Any) -> None:
    colour = {"before": theme.ink, "baseline": BASELINE}.get(mark.kind, FRONT if on_front else OTHER)
    shape = {"before": "X", "baseline": "D"}.get(mark.kind, "o" if on_front else "s")
    (x, left, right), (y, low, high) = mark.success, mark.worth
    axes.errorbar(
        x, y, xerr=[[max(0.0, x - left)], [max(0.0, right - x)]], yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        color=theme.faint, linewidth=0.7, alpha=0.55, capsize=0, zorder=2,
    )  # fmt: skip
    axes.plot(x, y, shape, color=colour, markersize=7, markeredgecolor=theme.paper, clip_on=False, zorder=3)


def _widen(axes: Any) -> None:
    """Keeps a scale from showing the noise of cells that are all alike."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - SPAN), high + 0.05 * max(SPAN, high - low))
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, low + SPAN))


def _label(axes: Any, marks: Sequence[Mark], theme: Any) -> None:
    """Numbers beside the marks, one label a heap of marks, each where no other label is."""
    axes.figure.canvas.draw()  # lays the axes out, so that places in points are known
    scale = 72 / axes.figure.dpi
    taken: list[tuple[float, float, float, float]] = []
    for heap in _heaps(axes, marks):
        text = ", ".join(str(number) for number in sorted(mark.number for mark in heap))
        place = max(mark.success[0] for mark in heap), max(mark.worth[0] for mark in heap)
        x, y = (scale * value for value in axes.transData.transform(place))
        width = 4.6 * len(text)
        offsets = [(side, up) for up in (5, -12, 15, -22, 25, -32) for side in (5, -5 - width)]

        def box(offset: tuple[float, float], x: float = x, y: float = y, width: float = width) -> Any:
            return (x + offset[0], y + offset[1], x + offset[0] + width, y + offset[1] + 9)

        free = (offset for offset in offsets if not any(_overlap(box(offset), other) for other in taken))
        offset = next(free, offsets[0])
        taken.append(box(offset))
        axes.annotate(
            text, place, xytext=offset, textcoords="offset points", size=8, color=theme.ink, zorder=4,
        )  # fmt: skip


def _heaps(axes: Any, marks: Sequence[Mark]) -> list[list[Mark]]:
    """Marks that lie on one another, each near another one of its heap."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def near(one: Mark, other: Mark) -> bool:
        across = abs(one.success[0] - other.success[0]) / (right - left)
        return across < NEAR and abs(one.worth[0] - other.worth[0]) / (high - low) < NEAR

    heaps: list[list[Mark]] = []
    for mark in marks:
        touched = [heap for heap in heaps if any(near(mark, other) for other in heap)]
        heaps = [heap for heap in heaps if heap not in touched]
        heaps.append([*(other for heap in touched for other in heap), mark])
    return heaps


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _list_names(side: Any, marks: Sequence[Mark], lines: Sequence[str], front: Sequence[Mark], theme: Any) -> None:
    side.set_axis_off()
    side.set(xlim=(0, 1), ylim=(max(len(lines), LINES) + 1.5, -0.5))
    for row, (mark, line) in enumerate(zip(marks, lines, strict=True)):
        colour = {"before": theme.ink, "baseline": BASELINE}.get(mark.kind, FRONT if mark in front else theme.faint)
        side.text(0, row, line, color=colour, size=8, va="center", parse_math=False)
    note = "blue: no other cell is better on both axes; orange: baseline; bars: 95 % intervals"
    side.text(0, len(lines) + 0.6, note, color=theme.faint, size=7, va="center")


def picture_files(table: Mapping[str, Any]) -> dict[str, bytes]:
    """
    The picture as files.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `dict`: name -> content; empty where there is nothing to draw.
    """
    figure = draw_pareto(table)
    if figure is None:
        return {}
    return {"pareto.png": encode(figure, "png"), "pareto.svg": encode(figure, "svg")}
