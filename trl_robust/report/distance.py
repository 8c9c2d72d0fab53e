"""The picture and the table of `diagnose-distance`, from the files that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from .figures import THEMES, Theme, encode

RESULTS, CASES = "distance.json", "cases.jsonl"
SCHEMA = 1

# Of the colour-blind-safe palette of Okabe and Ito (2008), as in the report.
POINT, SHUFFLED = "#0072B2", "#8C8C8C"
Row = tuple[str, Callable[[Mapping[str, Any]], str]]
NAMES = {"l2": "L2 distance", "cosine": "cosine distance", "token_normalised": "L2 / token norm"}


def draw_distance(
    summary: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    seed: int = 0,
    theme: Theme = THEMES["light"],
) -> Figure:
    """
    The loss at the worst wording against its distance, one row a site; beside it the same with distances exchanged.

    Args:
        summary (`Mapping`):
            `distance.json`.
        cases (sequence of `Mapping`):
            Rows of `cases.jsonl`.
        metric (`str`):
            Which distance is drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the exchange that is shown.
        theme ([`~trl_robust.report.figures.Theme`], *optional*):
            Colours.

    Returns:
        `Figure`.
    """
    sites = list(summary["sites"])
    figure = Figure(figsize=(8.4, 3.3 * len(sites) + 0.35), layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    drawn = [case for case in cases if case.get("included")]
    order = np.random.default_rng(seed).permutation(len(drawn))
    grid = figure.subplots(len(sites), 2, sharey=True, squeeze=False)
    for row, site in zip(grid, sites, strict=True):
        found = summary["sites"][site][metric]
        worst = np.array([case["distances"][site][metric]["to_original"][case["worst"] - 1] for case in drawn])
        drops = np.array([case["drop"] for case in drawn])
        title = _rho_title(summary.get("blocks", {}).get(site, site), found["spearman"])
        _scatter(row[0], worst, drops, title, POINT, theme)
        _line(row[0], worst, found, theme)
        row[0].set_ylabel("score: original - worst wording", color=theme.ink)
        _scatter(row[1], worst[order], drops, _shuffled_title(found["shuffled"]), SHUFFLED, theme)
        for axes in row:
            axes.set_xlabel(f"{NAMES[metric]} of the worst wording", color=theme.ink)
    return figure


def distance_tables(summary: Mapping[str, Any]) -> list[Table]:
    """
    The numbers of `distance.json` for the terminal: a table for every site, a column for every distance.

    Args:
        summary (`Mapping`):
            `distance.json`.

    Returns:
        `list` of `rich.table.Table`.
    """
    tables = []
    for site, by_metric in summary["sites"].items():
        table = Table(title=f"{summary.get('blocks', {}).get(site, site)}, {summary['n_included']} cases")
        table.add_column("")
        for metric in by_metric:
            table.add_column(metric)
        for name, show in _ROWS:
            table.add_row(name, *(show(found) for found in by_metric.values()))
        tables.append(table)
    return tables


def read_distance(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Reads what `diagnose-distance` wrote.

    Args:
        folder (`str` or `Path`):
            Folder with `distance.json` and `cases.jsonl`.

    Returns:
        `tuple`: the content of `distance.json`, and the cases that were scored.

    Raises:
        `FileNotFoundError`: one of the files is not there.
        `ValueError`: one of them cannot be read, or is of a newer schema.
    """
    folder = Path(folder)
    for name in (RESULTS, CASES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is not there. Name a folder that diagnose-distance has finished."
            )
    try:
        summary = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        lines = (folder / CASES).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder} cannot be read as JSON: {error}. Run diagnose-distance again.") from error
    if not isinstance(summary, dict) or summary.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"{folder / RESULTS} is not of schema {SCHEMA}. Use the version of trl-robust that wrote it.")
    return summary, [row for row in rows if row.get("status") == "scored"]


def write_distance_figure(folder: str | Path) -> Path:
    """
    Draws the figure of `diagnose-distance` again, with the distance and seed of the run.

    Args:
        folder (`str` or `Path`):
            Folder with `distance.json` and `cases.jsonl`.

    Returns:
        `Path` of `distance.png`.

    Raises:
        `FileNotFoundError`, `ValueError`: see [`read_distance`].
    """
    summary, cases = read_distance(folder)
    figure = draw_distance(summary, cases, summary["main"]["distance"], seed=summary["settings"]["seed"])
    path = Path(folder) / "distance.png"
    path.write_bytes(encode(figure, "png"))
    return path


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, title: str, colour: str, theme: Theme) -> None:
    axes.scatter(x, y, s=22, color=colour, alpha=0.75, edgecolors=theme.paper, linewidths=0.5, zorder=2)
    axes.set_title(title, color=theme.ink, fontsize=9, loc="left")
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.grid, linewidth=0.8, zorder=0)
    axes.tick_params(colors=theme.ink, length=0)
    axes.set_ylim(bottom=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
    if not len(x):
        axes.text(0.5, 0.5, "no case loses anything", transform=axes.transAxes, ha="center", color=theme.faint)


def _line(axes: Axes, x: np.ndarray, found: Mapping[str, Any], theme: Theme) -> None:
    if found["slope"] is not None:
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, found["intercept"] + found["slope"] * ends, color=theme.faint, linewidth=1.2, zorder=1)


def _rho_title(site: str, plain: Mapping[str, Any]) -> str:
    if plain["rho"] is None:
        return f"{site}: no correlation, {plain['why']}"
    return f"{site}: rho {plain['rho']:.2f} {_ends(plain['interval'])}, p {_p(plain['p'])}, n {plain['n']}"


def _shuffled_title(shuffled: Mapping[str, Any]) -> str:
    if shuffled["mean"] is None:
        return "exchanged between cases"
    return f"exchanged between cases: mean rho {shuffled['mean']:.2f} {_ends(shuffled['interval'])}"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _ends(interval: Sequence[float] | None) -> str:
    return "[-]" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _p(p: float | None) -> str:
    return "-" if p is None else ("< 1e-4" if p < 1e-4 else f"{p:.2g}")


def _test(found: Mapping[str, Any]) -> str:
    return "-" if found["difference"] is None else f"{found['difference']:+.3g}, p {_p(found['p'])}"


def _correlation(key: str) -> list[Row]:
    name = {
        "spearman": "Spearman rho",
        "partial": "partial rho",
        "selection_free": "all pairs",
        "within_case": "within a case",
    }[key]
    return [
        (name, lambda found: _value(found[key]["rho"])),
        ("  95 %", lambda found: _ends(found[key]["interval"])),
    ]


_ROWS: list[Row] = [
    *_correlation("spearman"),
    ("  p", lambda found: _p(found["spearman"]["p"])),
    *_correlation("partial"),
    *_correlation("selection_free"),
    *_correlation("within_case"),
    ("exchanged: mean", lambda found: _value(found["shuffled"]["mean"])),
    ("  95 %", lambda found: _ends(found["shuffled"]["interval"])),
    ("worst distance", lambda found: _plain(found["worst_distance"])),
    ("average of pairs", lambda found: _plain(found["average_distance"])),
    ("  worst less it", lambda found: _test(found["worst_against_average"])),
    ("from original", lambda found: _plain(found["average_from_original"])),
    ("  worst less it", lambda found: _test(found["worst_against_average_from_original"])),
]
"""Rows of a table: what stands at their left, and what of a site's numbers they show."""
