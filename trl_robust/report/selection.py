"""The report of a selection of rows, from `selection.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .examples import redact, shorten
from .figures import THEMES, Theme, encode
from .markup import document, image, pairs, section, table
from .selection_figures import draw_scores, draw_sources, draw_visits
from .tables import markdown_rows, markdown_text
from .values import describe

RESULTS = "selection.json"
SCHEMA = 1

HOW_TO_READ = (
    "Rows are ranked by their score, and those at the head are kept. Scores are told less their mean; the mean weight "
    "is 1. A ranking is a help in cleaning data and no guarantee: whoever knows the safe set can write harmful rows "
    "that resemble it."
)

REDACTED = (
    "What the rows say is left out, since it can be harmful; a marker shows its length, and the same marker is the "
    f"same text. The texts are in {RESULTS}. To show them here, choose the rows again with `show_rows`."
)

TITLES = {
    "top": "First in the ranking",
    "borderline": "Around the threshold: the last rows kept, then the first that are not",
    "bottom": "Last in the ranking",
}

CORRELATED = {
    "length": "length of the row (tokens trained on)",
    "first_loss": "loss at the first visit",
    "last_visit_step": "step of the last visit",
    "visits": "number of visits",
}

COUNTS = {
    "dataset": "rows",
    "scored": "rows with a score",
    "kept": "rows kept",
    "unknown": "rows it does not know",
    "unvisited": "rows it never visited",
    "missing": "rows that it alone has",
}

FIGURES: dict[str, tuple[Callable[[Mapping[str, Any], Theme], Figure | None], str]] = {
    "scores": (draw_scores, "Scores and weights of the rows that are kept and of those that are not."),
    "sources": (draw_sources, "Share of every source that is kept."),
    "visits": (draw_visits, "How often rows were visited in training."),
}


def write_selection_report(folder: str | Path, *, show_rows: bool = False) -> Path:
    """
    Writes `report.html`, `report.md` and `figures/` into a folder that holds `selection.json`.

    The page is one file: it opens offline, asks nothing of the network and needs no script.

    Args:
        folder (`str` or `Path`):
            Folder with `selection.json`.
        show_rows (`bool`, *optional*, defaults to `False`):
            Whether to show what rows say, in place of its length and a marker.

    Returns:
        `Path` of `report.html`.

    Raises:
        `FileNotFoundError`: there is no `selection.json`.
        `ValueError`: it cannot be read, or has a newer schema.
    """
    folder = Path(folder)
    summary = _read(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    images: dict[str, dict[str, bytes]] = {}
    for name, (draw, _) in FIGURES.items():
        drawn = {theme: draw(summary, colours) for theme, colours in THEMES.items()}
        images[name] = {theme: encode(figure, "svg") for theme, figure in drawn.items() if figure is not None}
        for form in ("png", "svg"):
            path = figures / f"{name}.{form}"
            if (light := drawn["light"]) is None:
                path.unlink(missing_ok=True)  # one from an earlier report would not belong to this one
            else:
                path.write_bytes(images[name]["light"] if form == "svg" else encode(light, "png"))
    shown = {name: themes for name, themes in images.items() if themes}
    (folder / "report.md").write_text(_markdown(summary, list(shown), show_rows), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(summary, shown, show_rows), encoding="utf-8")
    return page


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Name a folder that `trl-robust seal` or `select` has written.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}. Choose the rows again.") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} holds a {type(summary).__name__}; it must be an object. Choose the rows again.")
    if summary.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(
            f"{path} has schema {summary['schema']}, and this version reads {SCHEMA}. Use the version of trl-robust "
            "that wrote it."
        )
    return summary


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _significant(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}"


def _label(summary: Mapping[str, Any]) -> str:
    return str(_part(summary, "labels").get("column") or "the label")


def _part(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return summary.get(name) or {}


# What is told, as plain text. HTML and Markdown only differ in how they escape and lay it out.


def _headline(summary: Mapping[str, Any]) -> str:
    rows, method = _part(summary, "rows"), summary.get("method")
    said = f"{rows['kept']} of {rows['dataset']} rows are kept" if {"kept", "dataset"} <= set(rows) else "Rows chosen"
    if method:
        said += f", by {method}"
    if mixed := summary.get("mixed_in"):
        said += f"; {mixed} safety demonstrations are mixed in"
    return f"{said}."


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    rows, labels = _part(summary, "rows"), _part(summary, "labels")
    shares, visits = _part(summary, "effective_fraction"), _part(summary, "visits")
    facts = {label: str(rows[name]) for name, label in COUNTS.items() if name in rows}
    if summary.get("threshold") is not None:
        facts["threshold"] = (
            f"weight {_significant(summary['threshold'])}, score {_significant(summary.get('threshold_score'))}"
        )
        facts["rows of that score"] = _number(summary.get("tied"))
    if shares:
        facts["effective share"] = f"{_number(shares.get('all'))} (kept: {_number(shares.get('kept'))})"
    if visits:
        facts["visits of a row"] = f"{visits['min']} to {visits['max']}, mean {visits['mean']:.2f}"
    if labels:
        counts = f"{_number(labels.get('kept_labelled'))} of {_number(labels.get('labelled'))}"
        facts["kept with the label"] = f"{counts} rows with {_label(summary)}"
        facts["kept without it"] = (
            f"{_number(labels.get('precision_kept'))} of the rows kept (of all rows: "
            f"{_number(labels.get('precision_all'))})"
        )
        facts["AUROC"] = f"{_number(labels.get('auroc'))} (chance 0.5; 1 where all rows with the label come last)"
    return facts


def _sources(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["source", "rows", "kept", "share kept", "mean weight"]
    sources = _part(summary, "sources")
    labelled = any(found.get("labelled") is not None for found in sources.values())
    if labelled:
        head += [f"with {_label(summary)}", f"kept with {_label(summary)}"]
    rows = []
    for name, found in sources.items():
        cells = [str(found["rows"]), str(found["kept"]), _number(found["keep_rate"]), _number(found["mean_weight"])]
        if labelled:
            cells += [_number(found.get("labelled")), _number(found.get("kept_labelled"))]
        rows.append([name, *cells])
    return head, rows


def _precisions(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    found = _part(summary, "labels").get("precision_at") or []
    return ["first rows", "share of all", "of them without the label"], [
        [str(each["k"]), f"{each['share']:g}", _number(each["precision"])] for each in found
    ]


def _correlations(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, label in CORRELATED.items():
        found = _part(summary, "correlations").get(name)
        if found:
            why = f"none: {found['why']}" if found.get("why") else "-"
            rho = f"{found['rho']:+.3f}" if found.get("rho") is not None else why
            rows.append([label, rho, str(found["n"])])
    return ["score with", "Spearman's rho", "rows"], rows


def _agreement(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, found in _part(summary, "agreement").items():
        why = f"none: {found['why']}" if found.get("why") else "-"
        rho = f"{found['rho']:+.3f}" if found.get("rho") is not None else why
        within = ", ".join(
            f"{source} {each['rho']:+.2f}" if each["rho"] is not None else f"{source} -"
            for source, each in (found.get("within_source") or {}).items()
        )
        overlap = f"{_number(found.get('jaccard'))} (chance {_number(found.get('jaccard_by_chance'))})"
        rows.append([name, found.get("method") or "-", str(found["n"]), rho, within or "-", overlap])
    return ["selector", "method", "rows", "Spearman's rho", "within sources", "Jaccard of the kept rows"], rows


TABLES = (
    ("Sources", "What is kept of every source", _sources),
    ("Precision", "Rows without the label among the first rows of the ranking", _precisions),
    ("What the score goes along with", "Spearman's rank correlations of the score", _correlations),
    ("Agreement", "Agreement with other selectors, over rows that both have scored", _agreement),
)


def _text(content: Mapping[str, Any]) -> str:
    """What a row says, as one text: every message under its role, everything else under its column."""
    said = []
    for column, value in content.items():
        if isinstance(value, list):
            said += [
                f"{turn.get('role')}: {_said(turn.get('content'))}" for turn in value if isinstance(turn, Mapping)
            ]
        else:
            said.append(f"{column}: {_said(value)}")
    return "\n".join(said)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _examples(summary: Mapping[str, Any], show: bool) -> list[tuple[str, list[str], list[tuple[bool, list[str]]]]]:
    """Title, head and rows of every table of examples; a row with the label is marked."""
    labels = _part(summary, "labels")
    found = []
    for name, title in TITLES.items():
        rows = []
        for each in _part(summary, "examples").get(name) or []:
            text = _text(each.get("text") or {})
            copies = f" ({each['copies']} copies)" if each.get("copies", 1) > 1 else ""
            cells = [f"{each['row']}{copies}", f"{str(each['hash'])[:12]}", _significant(each.get("score"))]
            cells += [_significant(each.get("weight")), "kept" if each.get("kept") else "not kept"]
            cells.append("-" if each.get("source") is None else str(each["source"]))
            if labels:
                cells.append("yes" if each.get("label") else "no")
            rows.append((bool(each.get("label")), [*cells, shorten(text) if show else redact(text)]))
        if rows:
            head = ["row", "hash", "score", "weight", "kept", "source"]
            found.append((title, [*head, *([_label(summary)] if labels else []), "what it says"], rows))
    return found


def _page(summary: Mapping[str, Any], images: Mapping[str, Mapping[str, bytes]], show: bool) -> str:
    warnings = "".join(
        f'<p class="note marked">{escape(str(warning))}</p>\n' for warning in summary.get("warnings") or []
    )
    alt = " ".join([_headline(summary), *(f"{key}: {value}." for key, value in _facts(summary).items())])
    figures = "".join(image(images[name], alt, caption) for name, (_, caption) in FIGURES.items() if name in images)
    body = [
        f"<header><h1>Selection of rows</h1><p>{escape(_headline(summary))}</p></header>",
        "<main>",
        section("Results", warnings, f'<p class="note">{escape(HOW_TO_READ)}</p>', pairs(_facts(summary))),
        section("Figures", f'<div class="figures">{figures}</div>' if figures else ""),
    ]
    for heading, caption, tell in TABLES:
        head, rows = tell(summary)
        cells = [("", [escape(cell) for cell in row]) for row in rows]
        body.append(section(heading, table(caption, head, cells) if cells else ""))
    examples = [_details(title, head, rows, show) for title, head, rows in _examples(summary, show)]
    note = f"<p>{escape(REDACTED)}</p>" if examples and not show else ""
    body += [section("Rows", note, *examples), section("Settings", pairs(_settings(summary))), "</main>"]
    return document("Selection of rows", body)


def _details(title: str, head: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]], show: bool) -> str:
    cells = []
    for marked, (*first, text) in rows:
        said = escape(text) if show else f'<span class="none">{escape(text)}</span>'
        said = f'<div class="text">{said}</div>'
        cells.append(("marked" if marked else "", [*(escape(cell) for cell in first), said]))
    return f"<details><summary>{escape(title)} ({len(rows)})</summary>{table(title, head, cells)}</details>"


def _settings(summary: Mapping[str, Any]) -> dict[str, object]:
    """How the selector came about, and how it was applied; what was not given is left out."""
    found = {name: summary.get(name) for name in ("function", "normalized")} | dict(_part(summary, "settings"))
    for name, values in _part(summary, "run").items():
        given = {key: value for key, value in values.items() if value is not None}
        found[f"of this choice: {name}"] = given
    return {name: value for name, value in found.items() if value is not None}


def _markdown(summary: Mapping[str, Any], drawn: Sequence[str], show: bool) -> str:
    parts = ["# Selection of rows\n", f"{markdown_text(_headline(summary))}\n"]
    parts += [f"**Warning:** {markdown_text(str(warning))}\n" for warning in summary.get("warnings") or []]
    parts.append(f"{HOW_TO_READ}\n")
    if facts := _facts(summary):
        parts.append(markdown_rows(["", "value"], [[key, value] for key, value in facts.items()]))
    parts += [f"![{FIGURES[name][1]}](figures/{name}.png)\n" for name in drawn]
    for heading, caption, tell in TABLES:
        head, rows = tell(summary)
        if rows:
            parts.append(f"## {heading}\n\n{caption}.\n\n" + markdown_rows(head, rows))
    examples = _examples(summary, show)
    if examples:
        parts.append("## Rows\n" if show else f"## Rows\n\n{REDACTED}\n")
    for title, head, marked_rows in examples:
        parts.append(f"### {title}\n\n" + markdown_rows(head, [list(row) for _, row in marked_rows]))
    if settings := _settings(summary):
        parts.append("## Settings\n\n" + markdown_rows(["", "value"], [[k, describe(v)] for k, v in settings.items()]))
    return "\n".join(parts)
