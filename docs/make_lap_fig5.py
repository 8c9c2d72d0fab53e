"""Draws the curves of recipes/ablations/lap_fig5.yaml over the paper's Figure 5, and says which reading is nearer.

    python docs/make_lap_fig5.py runs/lap-fig5

takes any folder with runs of lap-sft in it that were made with `lap_curves: true`. The picture goes to lap_fig5.png in
the (first) folder, the comparison to the terminal.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STEPS = 8
EPSILONS = (0.01, 0.05, 0.10)
READINGS = {
    "paper": "A (paper): plain gradient, L2 norm",
    "paper_rms": "B (paper_rms): AdamW, root mean square",
}
QUANTITIES = {"norm": "norm", "lambda": "multiplier", "lagrangian": "Lagrangian", "loss_change": "change of the loss"}
CURVES, RECIPE = "lap_curves.jsonl", "recipe.yaml"
NEAR = 0.1
"""A reading that is farther off than this share of a quantity's range has not reproduced the figure."""
CLOSE = 0.1
"""Distances that differ by less than this share of the smaller are no difference."""

# Figure 5 of arXiv 2503.01345 (Llama-3-8b, averages over its data), digitised by us from the figure's vector graphics;
# the norm to 0.0006. It is the same for every epsilon. The change of the loss is not drawn: it follows from the
# multiplier by Eq. 8 with alpha = 2, at the six steps before which the multiplier has moved.
_NORM = [0.0, 0.0500, 0.0987, 0.1475, 0.1961, 0.2446, 0.2931, 0.3415]
_LOSS_CHANGE = [None, None, 0.0385, 0.0424, 0.0483, 0.0555, 0.0632, 0.0706]
PAPER: dict[str, dict[float, Sequence[float | None]]] = {
    "norm": dict.fromkeys(EPSILONS, _NORM),
    "lambda": {
        0.01: [0.1000, 0.1000, 0.1006, 0.1012, 0.1020, 0.1030, 0.1041, 0.1054],
        0.05: [0.1000, 0.1000, 0.0998, 0.0996, 0.0996, 0.0997, 0.1000, 0.1004],
        0.10: [0.1000, 0.1000, 0.0988, 0.0977, 0.0967, 0.0959, 0.0952, 0.0946],
    },
    "lagrangian": {
        0.01: [-0.0010, 0.0247, 0.0200, 0.0153, 0.0105, 0.0057, 0.0010, -0.0036],
        0.05: [-0.0050, 0.0207, 0.0158, 0.0108, 0.0058, 0.0008, -0.0042, -0.0091],
        0.10: [-0.0100, 0.0157, 0.0106, 0.0054, 0.0002, -0.0050, -0.0101, -0.0153],
    },
    "loss_change": dict.fromkeys(EPSILONS, _LOSS_CHANGE),
}


@dataclass(frozen=True)
class Curves:
    """
    Means over the searches of all runs with one preset and one epsilon.

    Args:
        values (`dict[str, list[float]]`):
            Name of a quantity -> its value before each of the first eight steps.
        rows (`int`):
            Searches that are averaged.
        left_out (`int`):
            Searches of batches in which something was not finite.
    """

    values: dict[str, list[float]]
    rows: int
    left_out: int


def read_curves(folders: Sequence[Path]) -> dict[tuple[str, float], Curves]:
    """
    Reads the curves of all runs in some folders.

    Args:
        folders (sequence of `Path`):
            Searched with all folders in them.

    Returns:
        `dict`: preset and epsilon -> [`Curves`]. Runs of other presets or epsilons are not in the figure, and are left
        out.

    Raises:
        `ValueError`: no curves, or fewer than eight steps of them.
    """
    found: dict[tuple[str, float], list[dict]] = {}
    for file in sorted(file for folder in folders for file in folder.rglob(CURVES)):
        settings = yaml.safe_load((file.parent / RECIPE).read_text(encoding="utf-8"))
        key = (settings.get("lap_preset", "robust"), float(settings.get("lap_epsilon", 0.05)))
        if key[0] in READINGS and key[1] in EPSILONS:
            lines = file.read_text(encoding="utf-8").splitlines()
            found.setdefault(key, []).extend(json.loads(line) for line in lines)
    if not found:
        raise ValueError(
            f"No {CURVES} of the presets {' or '.join(READINGS)} with epsilon {', '.join(map(str, EPSILONS))} in "
            f"{', '.join(map(str, folders))}. Run recipes/ablations/lap_fig5.yaml first."
        )
    return {key: _mean_of(lines, *key) for key, lines in sorted(found.items())}


def _mean_of(lines: Sequence[Mapping], preset: str, epsilon: float) -> Curves:
    shortest = min(len(line["norm"]) for line in lines)
    if shortest < STEPS:
        raise ValueError(
            f"The curves of {preset} with epsilon {epsilon} have {shortest} steps; the figure has {STEPS}. Set "
            f"`lap_steps: {STEPS}`."
        )
    finite = [line for line in lines if all(math.isfinite(v) for name in QUANTITIES for v in line[name][:STEPS])]
    rows = sum(line["rows"] for line in finite)
    values = {
        name: [_weighted([(line["rows"], line[name][step]) for line in finite]) for step in range(STEPS)]
        for name in QUANTITIES
    }
    return Curves(values, rows, sum(line["rows"] for line in lines) - rows)


def _weighted(pairs: Sequence[tuple[int, float]]) -> float:
    total = sum(rows for rows, _ in pairs)
    return sum(rows * value for rows, value in pairs) / total if total else math.nan


def distances(curves: Mapping[tuple[str, float], Curves]) -> dict[str, dict[str, float]]:
    """
    How far each reading is from the paper: root mean squares over steps and epsilons, as shares of the paper's range.

    Args:
        curves (`Mapping`):
            As [`read_curves`] gives them.

    Returns:
        `dict`: preset -> name of a quantity, or `"all"` -> distance. Only epsilons that all presets have count, so
        that they are compared on the same.
    """
    presets = list(dict.fromkeys(preset for preset, _ in curves))
    shared = [epsilon for epsilon in EPSILONS if all((preset, epsilon) in curves for preset in presets)]
    found: dict[str, dict[str, float]] = {}
    for preset in presets:
        own = {}
        for name in QUANTITIES:
            pairs = [
                (told, got)
                for epsilon in shared
                for told, got in zip(PAPER[name][epsilon], curves[preset, epsilon].values[name], strict=True)
                if told is not None
            ]
            span = range_of(name)
            squares = [((got - told) / span) ** 2 for told, got in pairs]
            own[name] = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
        own["all"] = math.sqrt(sum(value**2 for value in own.values()) / len(own))
        found[preset] = own
    return found


def range_of(name: str) -> float:
    """Largest minus smallest value of a quantity in the figure: the unit in which a distance from it is counted."""
    told = [value for values in PAPER[name].values() for value in values if value is not None]
    return max(told) - min(told)


def verdict(found: Mapping[str, Mapping[str, float]]) -> str:
    """
    What the distances say.

    Args:
        found (`Mapping`):
            As [`distances`] gives them.

    Returns:
        `str`: a sentence or two.
    """
    there = {preset: own["all"] for preset, own in found.items() if math.isfinite(own["all"])}
    if not there:
        return "No reading has finite curves, or they have no epsilon in common: nothing can be said."
    best = min(there, key=lambda preset: there[preset])
    if len(there) < len(READINGS):
        text = f"Only {READINGS[best]} can be compared"
    else:
        text = f"Nearer by least squares: {READINGS[best]}"
    text += f" ({there[best]:.2g} of the figure's range)."
    others = [distance for preset, distance in there.items() if preset != best]
    if others and min(others) < (1 + CLOSE) * there[best]:
        text += " The other one is hardly farther off: they cannot be told apart by this."
    if there[best] > NEAR:
        text += f" It is farther off than {NEAR:g}, so that it does not reproduce the figure."
    return text


def report(curves: Mapping[tuple[str, float], Curves]) -> str:
    """The comparison as Markdown."""
    found = distances(curves)
    lines = [f"| reading | epsilon | rows | left out | {' | '.join(f'{text}, 8' for text in QUANTITIES.values())} |"]
    lines += ["|---" * (4 + len(QUANTITIES)) + "|"]
    for (preset, epsilon), own in curves.items():
        last = " | ".join(f"{own.values[name][-1]:.4g}" for name in QUANTITIES)
        lines.append(f"| {preset} | {epsilon:g} | {own.rows} | {own.left_out} | {last} |")
    for epsilon in EPSILONS:
        last = " | ".join(f"{PAPER[name][epsilon][-1]:.4g}" for name in QUANTITIES)
        lines.append(f"| the paper's figure | {epsilon:g} | | | {last} |")
    lines += ["", "Distance, root mean square over steps and epsilons, in units of the figure's range:", ""]
    lines += [f"| reading | {' | '.join(QUANTITIES.values())} | all |", "|---" * (2 + len(QUANTITIES)) + "|"]
    for preset, distance in found.items():
        lines.append(f"| {preset} | {' | '.join(f'{distance[name]:.3g}' for name in (*QUANTITIES, 'all'))} |")
    return "\n".join([*lines, "", verdict(found)])


def draw(curves: Mapping[tuple[str, float], Curves]) -> Figure:
    """A panel a quantity: the paper's curves with marks, the readings' as lines, a colour an epsilon."""
    colours = dict(zip(EPSILONS, ("#0072B2", "#009E73", "#D55E00"), strict=True))  # Okabe and Ito (2008)
    styles = {"paper": "-", "paper_rms": ":"}
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    steps = list(range(1, STEPS + 1))
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, QUANTITIES.items(), strict=True):
        for epsilon, told in PAPER[name].items():
            known = [(step, value) for step, value in zip(steps, told, strict=True) if value is not None]
            axes.plot(
                *zip(*known, strict=True), "o", color=colours[epsilon], markersize=5, fillstyle="none",
                label=f"figure, epsilon {epsilon:g}",
            )  # fmt: skip
        for (preset, epsilon), own in curves.items():
            axes.plot(
                steps, own.values[name], styles[preset], color=colours[epsilon], linewidth=1.4,
                label=f"{preset}, epsilon {epsilon:g}",
            )  # fmt: skip
        axes.set(xlabel="step of the search", ylabel=label)
        axes.grid(color="#d9dee3", linewidth=0.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs in them")
    arguments = parser.parse_args(argv)
    try:
        curves = read_curves(arguments.folders)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(curves))
    picture = arguments.folders[0] / "lap_fig5.png"
    draw(curves).savefig(picture, dpi=150)
    print(f"\nDrawn into {picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
