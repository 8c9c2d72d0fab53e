"""The figure of prompt robustness: what the scores of each case range over."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .figures import THEMES, Theme

# Of the colour-blind-safe palette of Okabe and Ito (2008), as in the report's other figures.
RANGE, ORIGINAL = "#56B4E9", "#D55E00"
_WIDTH = 4.8  # inches, as the report's other figures


def draw_prompt_ranges(models: Sequence[Mapping[str, Any]], theme: Theme = THEMES["light"]) -> Figure | None:
    """
    For each model, a line a case from its worst to its best wording, and a mark at the original wording.

    Cases are in the order of the original's score, then of the worst one. What the same prompt ranges over, where it
    was sampled, stands as a pale band: the mean of its worst and of its best.

    Args:
        models (`Sequence[Mapping]`):
            Entries of `results.json`.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.

    Returns:
        `Figure`, or `None` where nothing was scored.
    """
    drawn = [(model["name"], rows, model["prompts"]) for model in models if (rows := _ranges(model))]
    if not drawn:
        return None
    figure = Figure(figsize=(_WIDTH, 2.1 * len(drawn) + 0.6), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    handles: dict[str, Artist] = {}
    for number, (name, rows, prompts) in enumerate(drawn):
        axes = figure.add_subplot(len(drawn), 1, number + 1)
        places = range(1, len(rows) + 1)
        lows, highs, originals = zip(*rows, strict=True)
        null = (prompts.get("same_prompt_null") or {}).get("null") or {}
        if null.get("worst") is not None:
            axes.axhspan(
                null["worst"], null["best"], color=theme.grid, zorder=0, label="same prompt, mean worst to best"
            )
        axes.vlines(places, lows, highs, color=RANGE, linewidth=max(1.0, 120 / len(rows)) if len(rows) > 40 else 3)
        axes.plot(places, originals, "o", color=ORIGINAL, markersize=3, clip_on=False, label="original wording")
        axes.set_title(
            textwrap.shorten(name, 54, placeholder=" ...").replace("$", r"\$"), color=theme.ink, fontsize=9, loc="left"
        )
        axes.set_ylabel("score", color=theme.ink)
        axes.set_facecolor(theme.paper)
        axes.set_ylim(-0.04, 1.04)
        axes.grid(axis="y", color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.ink, length=0)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
        # One legend for all panels: the first may lack the band.
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles, frameon=False, labelcolor=theme.ink, fontsize=8, loc="outside upper left", ncols=2
    )
    axes.set_xlabel("cases, by the score of the original wording", color=theme.ink)
    return figure


def _ranges(model: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """Worst, best and original of every case that has them, in the order of the figure."""
    rows = []
    for case in (model.get("prompts") or {}).get("cases") or []:
        scores = case.get("scores") or []
        scored = [score for score in scores if score is not None]
        if len(scored) >= 2 and scores[0] is not None:
            rows.append((min(scored), max(scored), scores[0]))
    return sorted(rows, key=lambda row: (row[2], row[0], row[1]))
