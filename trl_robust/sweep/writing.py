"""The table of a sweep as JSON, Markdown, CSV and on a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..report.tables import markdown_rows, markdown_text
from ..scripts.run_folder import write_json
from .cells import BEFORE
from .picture import picture_files
from .stages import SELECTION
from .table import PRODUCT, SEARCH, headline, worth
from .wordings import MEASURES

HOW_TO_READ = (
    "Every figure is a share between 0 and 1, the mean over seeds and requests, with a 95 % bootstrap interval over "
    "both in brackets."
)
OF_ATTACKS = (
    "Attack success: lower is safer. Compliance: harmless requests that look harmful and are not refused. A low "
    "attack success of a model that has lost compliance or utility means nothing."
)
OF_WORDINGS = (
    "Worst-case accuracy: questions answered rightly in every wording; average accuracy: over wordings; original "
    "wording: questions as they are. Higher is better."
)
OF_SEARCH = (
    "Of the search, means over the run's log: relative norm of the perturbation (in that of the hidden states), size "
    "of the loss change at its end, share of rows within epsilon, multiplier."
)
OF_SELECTION = (
    "Of the rows that the first stage chose: the chance that the selector ranks a harmless row above a harmful one "
    "(selector AUROC; higher is better), and the share of the harmful rows that are kept (lower is better)."
)
HOW_TO_READ_DIFFERENCES = (
    "Cell minus baseline, on the same requests with the same seeds, so that what is hard for both cancels out. An "
    "interval that holds 0 is no difference that these seeds and requests can show."
)


def write_all(folder: Path, table: Mapping[str, Any]) -> None:
    """
    Writes `sweep.json`, `sweep.md`, `sweep.csv` and `figures/pareto.{png,svg}`.

    Args:
        folder (`Path`):
            Where to.
        table (`Mapping`):
            What [`tabulate`] returns.
    """
    figures = picture_files(table)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        (folder / "figures" / name).write_bytes(content)
    (folder / "sweep.csv").write_text(csv_text(table), encoding="utf-8", newline="")
    (folder / "sweep.md").write_text(markdown(table, picture="pareto.png" in figures), encoding="utf-8")
    write_json(folder / "sweep.json", dict(table))


def markdown(table: Mapping[str, Any], *, picture: bool = True) -> str:
    """
    The page of a sweep.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.
        picture (`bool`, *optional*, defaults to `True`):
            Whether there is one to show.

    Returns:
        `str`.
    """
    seeds, baseline = ", ".join(map(str, table["seeds"])), markdown_text(table["baseline"])
    lines = [
        f"# Sweep: {markdown_text(Path(table['grid']).stem)}",
        "",
        f"{len(table['cells']) - 1} cells of {_trainings(table)}, seeds {seeds}. "
        f"{_what_of(table)}Baseline: {baseline}.",
        "",
        " ".join(_how_to_read(table)),
        "",
        _figures_table(table),
        f"## Differences to: {baseline}",
        "",
        HOW_TO_READ_DIFFERENCES,
        "",
        _differences_table(table),
    ]
    if same := [cell for cell in table["cells"] if cell.get("same_as")]:
        lines += ["## Cells that cannot differ", "", "Run once, known beforehand:", ""]
        lines += [
            f"- {markdown_text(cell['name'])} is {markdown_text(cell['same_as'])}: {markdown_text(cell['why_same'])}."
            for cell in same
        ]
        lines.append("")
    if failed := [f"- {markdown_text(f'{name}: {why}')}" for name, why in table["failed"].items()]:
        lines += ["## Failed", "", *failed, ""]
    if table["missing"]:
        lines += [f"Not finished yet: {markdown_text('; '.join(table['missing']))}.", ""]
    if picture:
        what = "Attack success" if table["attacks"] else "Questions failed in some wording"
        against = "compliance and utility" if table["attacks"] else "what the model is good for"
        lines += [f"![{what} against {against}](figures/pareto.png)", ""]
    return "\n".join(lines)


def _trainings(table: Mapping[str, Any]) -> str:
    text = f"`{table['verb']}` on `{table['recipe']}`"
    return f"{text}, then `{then['verb']}` on `{then['recipe']}`" if (then := table["then"]) else text


def _what_of(table: Mapping[str, Any]) -> str:
    judge = f"judge: {table['judge']}. "
    if table["attacks"]:
        return f"Mean success is over {', '.join(table['mean_over'])}; {judge}"
    return f"Questions in several wordings; {judge}" if table["wordings"] else ""


def _how_to_read(table: Mapping[str, Any]) -> list[str]:
    there = (
        (True, HOW_TO_READ),
        (table["attacks"], OF_ATTACKS),
        (table["wordings"], OF_WORDINGS),
        (_searches(table) == list(SEARCH), OF_SEARCH),
        (any(name in SELECTION for name in _more(table)), OF_SELECTION),
    )
    return [text for shown, text in there if shown]


def _searches(table: Mapping[str, Any]) -> list[str]:
    """Columns that tell how the search for perturbations went."""
    trains = table["verb"] if table["then"] is None else table["then"]["verb"]
    found = list(SEARCH) if trains.startswith("lap-") else ["boundary"]
    if table["then"] is None:
        return found
    runs = [run for cell in table["cells"] for run in cell["runs"]]
    return [name for name in found if any(_of_search(run, name) is not None for run in runs)]


def _figures_table(table: Mapping[str, Any]) -> str:
    more, searches = _more(table), _searches(table)
    measures = [*dict.fromkeys([*headline(table), *worth(table)]), *table["attacks"], *more]
    head = ["cell", "seeds", *measures, *searches, "s a run"]
    rows = []
    for cell in table["cells"]:
        if cell.get("same_as"):
            rows.append([cell["name"], f"same as {cell['same_as']}", *([""] * (len(head) - 2))])
            continue
        short = (*table["attacks"], *more)
        cells = [_shown(cell["figures"].get(name), interval=name not in short) for name in measures]
        found = [
            _mean([_of_search(run, name) for run in cell["runs"]], ".2f" if name == "boundary" else ".3g")
            for name in searches
        ]
        seconds = _mean([sum(run["seconds"].values()) for run in cell["runs"]])
        rows.append([cell["name"], str(len(cell["runs"])), *cells, *found, seconds and f"{float(seconds):.0f}"])
    return markdown_rows(head, rows)


def _of_search(run: Mapping[str, Any], name: str) -> float | None:
    return run["boundary_fraction"] if name == "boundary" else run["search"].get(name)


def _differences_table(table: Mapping[str, Any]) -> str:
    chosen = [name for name in _more(table) if name in SELECTION]
    measures = list(dict.fromkeys([*headline(table), *(name for name in worth(table) if name != PRODUCT), *chosen]))
    rows = [
        [cell["name"], *(_shown(cell["differences"].get(name), signed=True) for name in measures)]
        for cell in table["cells"]
        if not cell.get("same_as") and cell["name"] != table["baseline"]
    ]
    return markdown_rows(["cell", *measures], rows)


def _more(table: Mapping[str, Any]) -> list[str]:
    """Columns that only some sweeps have: what a first stage chose, and benchmarks."""
    there = dict.fromkeys(name for cell in table["cells"] for name in cell["figures"])
    return [name for name in SELECTION if name in there] + [name for name in there if "(lm-eval)" in name]


def _shown(estimate: Mapping[str, Any] | None, *, interval: bool = True, signed: bool = False) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    form = "+.2f" if signed else ".2f"
    text = format(estimate["value"] + 0.0, form)
    ends = estimate["interval"]
    return f"{text} [{ends[0]:{form}}, {ends[1]:{form}}]" if interval and ends is not None else text


def _mean(values: Sequence[float | None], form: str = ".2f") -> str:
    there = [value for value in values if value is not None]
    return format(sum(there) / len(there), form) if there else ""


def csv_text(table: Mapping[str, Any]) -> str:
    """
    One line a run, for other programs.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `str`.
    """
    stream = io.StringIO()
    plain = ("utility", "over_refusal", "boundary_fraction", "updates", "forward_passes")
    wordings = list(MEASURES) if table["wordings"] else []
    searches = [name for name in _searches(table) if name in SEARCH]
    writer = csv.writer(stream, lineterminator="\n")
    seconds = ("training", "measuring")
    chosen = [*SELECTION, "rows"] if table["then"] else []
    writer.writerow(
        [
            *("cell", "same_as", "seed", "settings"),
            *(f"success {name}" for name in table["attacks"]),
            *(*wordings, *plain, *searches),
            *(f"{name} kept" if name == "rows" else name for name in chosen),
            *(f"{name} seconds" for name in seconds),
        ]
    )
    for cell in table["cells"]:
        for run in cell["runs"]:
            success = [run["success"].get(name) for name in table["attacks"]]
            settings = json.dumps(cell.get("settings", {}))
            own = [cell["name"], cell.get("same_as"), run["seed"], settings]
            found = [run["wordings"].get(name) for name in wordings] + [run[name] for name in plain]
            found += [run["search"].get(name) for name in searches] + [run["selection"].get(name) for name in chosen]
            found += [run["seconds"][name] for name in seconds]
            writer.writerow([*own, *success, *found])
    return stream.getvalue()


def terminal_table(table: Mapping[str, Any]) -> Table:
    """
    What matters most, for a terminal.

    Args:
        table (`Mapping`):
            What [`tabulate`] returns.

    Returns:
        `rich.table.Table`.
    """
    first, *others = dict.fromkeys([*headline(table), *(name for name in worth(table) if name != PRODUCT)])
    title = f"Mean attack success over {', '.join(table['mean_over'])}" if table["attacks"] else first.capitalize()
    found = Table(title=Text(title), title_justify="left")
    found.add_column("cell", overflow="fold")
    for name in ("seeds", first, "difference", *others):
        found.add_column(name, no_wrap=True)
    for cell in table["cells"]:
        name = cell["name"] + (" (baseline)" if cell["name"] == table["baseline"] else "")
        if cell.get("same_as"):
            found.add_row(Text(f"{name}: same as {cell['same_as']}"))
            continue
        figures = cell["figures"]
        difference = "" if cell["name"] == table["baseline"] else _shown(cell["differences"][first], signed=True)
        found.add_row(
            Text(name),
            str(len(cell["runs"])),
            *(Text(text) for text in (_shown(figures[first]), difference)),
            *(Text(_shown(figures[measure], interval=False)) for measure in others),
        )
    return found


def plan_lines(names: Mapping[str, str], same: Mapping[str, tuple[str, str]]) -> list[str]:
    """
    The cells of a grid and those that cannot differ, a line each.

    Args:
        names (`Mapping`):
            Name of a cell -> its own settings, shown.
        same (`Mapping`):
            Name of a cell -> the one it cannot differ from, and why.

    Returns:
        `list[str]`.
    """
    lines = [BEFORE]
    for name, settings in names.items():
        lines.append(f"{name}: {settings}" if settings else f"{name}: the base recipe")
        if name in same:
            other, why = same[name]
            lines.append(f"    cannot differ from {other!r}, run once: {why}")
    return lines
