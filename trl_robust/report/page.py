"""The report of an evaluation: `report.html` in one file, `report.md`, `model_card.md`, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from .captions import HOW_TO_READ, alt_of, caption_of, in_bars
from .card import write_card
from .content import Section
from .curve_figures import draw_curves, draw_maps
from .examples import Examples
from .figures import THEMES, draw_success, draw_trade_off, encode
from .markdown import markdown_page
from .markup import document, folded, image, lines_of, pairs, plain_table, section, table
from .page_parts import attack_rows, example_rows, measures
from .reading import ModelResult, Results, read_results, side_by_side
from .sections import sections, stands_out
from .tables import NOTE, attack_cell, measure_cell

DRAWN: dict[str, Callable[..., Figure | None]] = {
    "attack_success": lambda results, theme: draw_success(in_bars(results), theme),
    "trade_off": draw_trade_off,
    "curves": draw_curves,
    "sites": draw_maps,
}
"""Names of the figures, and what draws them."""

COLUMNS = {"curves": 3, "sites": 3}
"""Panels side by side in the figures that a wide screen and the files have."""

Images = Mapping[str, Mapping[str, bytes]]


def write_report(
    folder: str | Path,
    *,
    sources: Sequence[str | Path] | None = None,
    show_generations: bool = False,
) -> Path:
    """
    Writes `report.html`, `report.md`, `model_card.md` and `figures/` into `folder`, from files on disk alone.

    The page is one file: it opens offline, asks nothing of the network and needs no script.

    Args:
        folder (`str` or `Path`):
            Folder to write into. Holds `results.json` and, optionally, `generations.jsonl`, unless `sources` is given.
        sources (`Sequence[str | Path]`, *optional*):
            Evaluations' folders to show side by side instead. A model's name that occurs in several of them gets the
            name of its folder added.
        show_generations (`bool`, *optional*, defaults to `False`):
            Whether to show the text of example prompts and responses. By default only length and a marker are shown.

    Returns:
        `Path` of `report.html`.

    Raises:
        `FileNotFoundError`: where a folder has no `results.json`.
        `ValueError`: where a `results.json` has a newer schema or holds a value that cannot be reported.
    """
    folder = Path(folder)
    results, examples = _read([Path(source) for source in sources] if sources else [folder])
    images = _draw(results, folder / "figures")
    drawn = [name for name, themes in images.items() if themes]
    (folder / "report.md").write_text(markdown_page(results, drawn), encoding="utf-8")
    write_card(folder, results)
    page = folder / "report.html"
    page.write_text(_page(results, images, examples, show_generations), encoding="utf-8")
    return page


def _read(folders: Sequence[Path]) -> tuple[Results, Examples]:
    labels = [path.resolve().name for path in folders]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in folders]
    if len({path.resolve() for path in folders}) < len(folders):
        raise ValueError(f"A folder is given twice among {', '.join(labels)}. Give each one once.")
    parts = {label: read_results(path) for label, path in zip(labels, folders, strict=True)}
    results = next(iter(parts.values())) if len(parts) == 1 else side_by_side(parts)
    examples, offset = Examples(), 0
    for part, path in zip(parts.values(), folders, strict=True):
        # side_by_side keeps the order, so that a model's old name finds its new one by position.
        shown = {old.name: new.name for old, new in zip(part.models, results.models[offset:], strict=False)}
        offset += len(part.models)
        examples.add(path, shown)
    return results, examples


def _draw(results: Results, folder: Path) -> dict[str, dict[str, bytes]]:
    """Draws the figures, writes them as files, and returns those of the page: SVG by name and theme."""
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, dict[str, bytes]] = {}
    for name, draw in DRAWN.items():
        drawn = {theme: draw(results, colours) for theme, colours in THEMES.items()} if results.attack_names else {}
        if drawn.get("light") is not None and name in COLUMNS:
            for theme, colours in THEMES.items():
                drawn[f"wide {theme}"] = draw(results, colours, COLUMNS[name])
        images[name] = {theme: encode(figure, "svg") for theme, figure in drawn.items() if figure is not None}
        file = "wide light" if "wide light" in drawn else "light"
        light = drawn.get(file)
        for form in ("png", "svg"):
            path = folder / f"{name}.{form}"
            if light is None:
                path.unlink(missing_ok=True)  # one from an earlier report would not belong to this one
            else:
                path.write_bytes(images[name][file] if form == "svg" else encode(light, "png"))
    return images


# HTML. Every text from a file passes through escape() on its way in; nothing else builds markup from data.


def _page(results: Results, images: Images, examples: Examples, show_generations: bool) -> str:
    title = "Attacks on " + ", ".join(model.name for model in results.models)
    created = escape(f" Evaluated {results.created}.") if results.created else ""
    drawn = [name for name, themes in images.items() if themes]
    below = sections(results, drawn)
    shown_below = {name for found in below for name in found.figures}
    body = [
        f"<header><h1>Attack report</h1><p>{escape(title)}.{created}</p>{_descriptions(results)}</header>",
        "<main>",
        _overview(results),
        section("Figures", _figures(results, images, [name for name in drawn if name not in shown_below])),
        *(_section(found, results, images) for found in below),
        section("Attacks", *attack_rows(results)),
        section("Other measures", *(plain_table(one) for one in measures(results))),
        section("Examples", *example_rows(examples, show_generations)),
        section("Versions", pairs(results.versions)),
        "</main>",
    ]
    return document(title, body)


def _overview(results: Results) -> str:
    found = stands_out(results)
    made = [_results(results)] if found is None else [_content(found)]
    heading = "Results" if found is None else found.heading
    return section(heading, f"<p>{escape(HOW_TO_READ)}</p>", pairs(results.summary), *made, _warnings(results))


def _section(found: Section, results: Results, images: Images) -> str:
    return section(found.heading, _content(found, _figures(results, images, found.figures)))


def _content(found: Section, figures: str = "") -> str:
    paragraphs = [f"<p>{escape(text)}</p>" for text in found.text]
    tables = "\n".join(plain_table(one) for one in found.tables)
    if found.fold and tables:
        tables = folded(found.fold, tables)
    title = f"<h3>{escape(found.pairs_title)}</h3>" if found.pairs and found.pairs_title else ""
    parts = [*paragraphs, figures, tables, title, pairs(found.pairs, sentences=True)]
    return "\n".join(part for part in parts if part)


def _descriptions(results: Results) -> str:
    """What the models are, where the overview has no room for it."""
    if stands_out(results) is None:
        return ""
    return pairs({model.name: model.description for model in results.models if model.description})


def _model_cell(model: ModelResult) -> str:
    text = escape(model.name)
    if model.description:
        text += f"<br><small>{escape(model.description)}</small>"
    return text + "".join(f'<br><strong class="mark">! {escape(warning)}</strong>' for warning in model.warnings)


def _results(results: Results) -> str:
    names = results.attack_names
    rows = [
        (
            "marked" if model.warnings else "",
            [
                _model_cell(model),
                *(lines_of(attack_cell(model.attacks.get(name))) for name in names),
                lines_of(measure_cell(model.utility)),
                lines_of(measure_cell(model.over_refusal)),
            ],
        )
        for model in results.models
    ]
    head = ["model", *names, "utility", "over-refusal"]
    return table("Attack success by attack, utility and over-refusal, with intervals", head, rows)


def _warnings(results: Results) -> str:
    marked = [model.name for model in results.models if model.warnings]
    named = f" Marked for this: {', '.join(marked)}." if marked else ""
    return f'<p class="{"note marked" if marked else "note"}">{escape(NOTE + named)}</p>'


def _figures(results: Results, images: Images, names: Sequence[str]) -> str:
    parts = [image(images[name], alt_of(name, results), caption_of(name, results)) for name in names]
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""
