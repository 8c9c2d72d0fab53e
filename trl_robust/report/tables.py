"""Attack success of all models as a terminal table and as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .reading import AttackResult, Measure, ModelResult, Results, parse_results
from .values import Interval

# A rule under the head and nothing else: six attacks leave no room for lines between columns; logs are often ASCII.
_HEAD_RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_HEADER_WIDTH = 12  # that of "[0.60, 0.85]", which a column has in any case
_NAME_WIDTH = 16

NOTE = (
    "Low attack success means little where the model refuses harmless prompts or has lost its utility: "
    "an answer of no use to anyone is not a safe one."
)

Cell = list[str]


def results_table(results: Mapping[str, object] | Results, *, width: int | None = None) -> Table:
    """
    Table of attack success with intervals, utility and over-refusal, for a terminal.

    Models are rows and attacks columns where that fits into `width`; otherwise attacks become rows; where that does
    not fit either, every value gets its own row. From 42 columns up no number is broken or cut. The table's own
    characters are ASCII.

    Args:
        results (`Mapping`):
            Content of a `results.json`.
        width (`int`, *optional*):
            Columns to fit into. Those of the terminal as rich sees it when not given; a console that is created with
            another width should pass its own.

    Returns:
        `rich.table.Table`.
    """
    parsed = _parsed(results)
    width = Console().width if width is None else width
    grid = _grid(parsed)
    layouts = [
        grid,
        _transposed(grid, parsed),
        _stacked(parsed, on_one_line=True),
        _stacked(parsed, on_one_line=False),
    ]
    table = _rich_table(next((layout for layout in layouts if _width(layout, gap=1) <= width), layouts[-1]), width)
    warned = [f"! {_printable(model.name)}: {', '.join(model.warnings)}." for model in parsed.models if model.warnings]
    if warned:
        table.caption = Text("\n".join([*warned, NOTE]))
        table.caption_justify = "left"
    return table


def markdown_table(results: Mapping[str, object] | Results) -> str:
    """
    The same table in Markdown: one row a model, one column an attack, with a note where low success means little.

    Args:
        results (`Mapping`):
            Content of a `results.json`.

    Returns:
        `str`, ending in a newline.
    """
    parsed = _parsed(results)
    head = ["model", *parsed.attack_names, "utility", "over-refusal", "note"]
    rows = [
        [
            model.name,
            *(" ".join(attack_cell(model.attacks.get(name))) for name in parsed.attack_names),
            " ".join(measure_cell(model.utility)),
            " ".join(measure_cell(model.over_refusal)),
            "; ".join(model.warnings),
        ]
        for model in parsed.models
    ]
    return markdown_rows(head, rows)


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain text: whatever would be read as markup is escaped."""
    lines = [[markdown_text(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(r"([\\`*|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    # A bracket starts a link only where another bracket or a parenthesis follows it; intervals stay as they are.
    return re.sub(r"\](?=[\[(:])", r"\\]", escaped)


def attack_cell(attack: AttackResult | None) -> Cell:
    """Lines of a cell: success, interval, and how many rows errored."""
    if attack is None:
        return ["not run"]
    if attack.success is None and attack.destroyed:
        return ["destroyed"]
    return _value_lines(attack.success, attack.interval, attack.n_errored, "no score")


def measure_cell(measure: Measure | None) -> Cell:
    """Lines of a cell: value, interval, and how many rows errored."""
    return ["-"] if measure is None else _value_lines(measure.value, measure.interval, measure.n_errored, "-")


def _value_lines(value: float | None, interval: Interval | None, n_errored: int, missing: str) -> Cell:
    lines = [missing if value is None else f"{value:.2f}"]
    if value is not None and interval is not None:
        lines.append(f"[{interval[0]:.2f}, {interval[1]:.2f}]")
    return [*lines, f"{n_errored} errored"] if n_errored else lines


def _parsed(results: Mapping[str, object] | Results) -> Results:
    return results if isinstance(results, Results) else parse_results(results)


def _printable(text: str) -> str:
    # A control character in a name would move the cursor or recolour the terminal.
    return "".join(character if character.isprintable() else "?" for character in text)


def _wrapped(text: str, width: int) -> Cell:
    """Breaks a name into lines of at most `width`: after hyphens, underscores and spaces, and anywhere if need be."""
    lines = [""]
    for part in re.findall(r"[^-_ /]*[-_ /]?", _printable(text)):
        while part:
            if len(lines[-1]) + len(part.rstrip()) <= width:
                lines[-1] += part
                break
            if lines[-1]:
                lines.append("")
            else:
                lines[-1], part = part[:width], part[width:]
                if part:
                    lines.append("")
    return [line.rstrip() for line in lines if line.strip()] or [""]


def _name_lines(model: ModelResult, width: int) -> Cell:
    return _wrapped(f"! {model.name}" if model.warnings else model.name, width)


def _grid(results: Results) -> list[list[Cell]]:
    names = results.attack_names
    head = [["model"], *(_wrapped(name, _HEADER_WIDTH) for name in names), ["utility"], ["over-refusal"]]
    rows = [
        [
            _name_lines(model, _NAME_WIDTH),
            *(attack_cell(model.attacks.get(name)) for name in names),
            measure_cell(model.utility),
            measure_cell(model.over_refusal),
        ]
        for model in results.models
    ]
    return [head, *rows]


def _transposed(grid: list[list[Cell]], results: Results) -> list[list[Cell]]:
    names = [_name_lines(model, _HEADER_WIDTH) for model in results.models]
    _, *columns = zip(*grid, strict=True)
    return [[["attack"], *names], *(list(column) for column in columns)]


def _stacked(results: Results, on_one_line: bool) -> list[list[Cell]]:
    rows: list[list[Cell]] = [[["model"], ["measure"], ["value"]]]
    for model in results.models:
        cells = {name: attack_cell(model.attacks.get(name)) for name in results.attack_names}
        cells |= {"utility": measure_cell(model.utility), "over-refusal": measure_cell(model.over_refusal)}
        for position, (name, lines) in enumerate(cells.items()):
            label = _name_lines(model, _NAME_WIDTH) if position == 0 else [""]
            if on_one_line:
                lines = [" ".join(lines[:2]), *lines[2:]]
            rows.append([label, _wrapped(name, _HEADER_WIDTH), lines])
    return rows


def _width(grid: list[list[Cell]], gap: int) -> int:
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)]
    return sum(widths) + gap * (len(widths) - 1)


def _rich_table(grid: list[list[Cell]], width: int) -> Table:
    # The box puts one space between columns; a second one goes in where there is room for it.
    spare = 1 if _width(grid, gap=2) <= width else 0
    table = Table(
        title=Text("Attack success (lower is safer) and its interval, by attack"),
        title_justify="left",
        title_style="bold",
        box=_HEAD_RULE,
        show_edge=False,
        pad_edge=False,
        padding=(0, spare, 0, 0),
        highlight=False,
    )
    head, *rows = grid
    for lines in head:
        table.add_column(Text("\n".join(lines)), no_wrap=True, vertical="top")
    for row in rows:
        # Text, not str: rich would read "[red]" in a model's name as markup.
        table.add_row(*(Text("\n".join(lines)) for lines in row))
    return table
