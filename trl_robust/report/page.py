"""The report of an evaluation: `report.html` in one file, `report.md`, and the figures beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from .captions import HOW_TO_READ, alt_of, caption_of
from .curve_figures import draw_curves, draw_maps, strongest
from .examples import REDACTED, Examples, redact, shorten
from .figures import THEMES, draw_success, draw_trade_off, encode
from .markdown import card, markdown_page
from .markup import document, image, lines_of, pairs, plain_table, section, table
from .reading import AttackResult, ModelResult, Results, read_results, side_by_side
from .sections import Section, Table, sections
from .tables import NOTE, attack_cell, measure_cell
from .values import Interval, describe, interval_of

FOLDED = 30
"""Rows up to which a table stands open."""

MOST_BARS = 48
"""Bars up to which the figure of attack success shows all attacks; with more, the strongest of every class."""


def _drawn_success(results: Results) -> Results:
    return strongest(results) if len(results.attack_names) * len(results.models) > MOST_BARS else results


DRAWN: dict[str, Callable[..., Figure | None]] = {
    "attack_success": lambda results, theme: draw_success(_drawn_success(results), theme),
    "trade_off": draw_trade_off,
    "curves": draw_curves,
    "sites": draw_maps,
}
"""Names of the figures, and what draws them."""


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
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    images: dict[str, dict[str, bytes]] = {}
    for name, draw in DRAWN.items():
        drawn = {theme: draw(results, colours) for theme, colours in THEMES.items()} if results.attack_names else {}
        images[name] = {theme: encode(figure, "svg") for theme, figure in drawn.items() if figure is not None}
        light = drawn.get("light")
        for form in ("png", "svg"):
            path = figures / f"{name}.{form}"
            if light is None:
                path.unlink(missing_ok=True)  # one from an earlier report would not belong to this one
            else:
                path.write_bytes(images[name]["light"] if form == "svg" else encode(light, "png"))
    drawn_names = [name for name, themes in images.items() if themes]
    (folder / "report.md").write_text(markdown_page(results, drawn_names), encoding="utf-8")
    (folder / "model_card.md").write_text(card(results), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(results, images, examples, show_generations), encoding="utf-8")
    return page


def _read(folders: Sequence[Path]) -> tuple[Results, Examples]:
    labels = [path.resolve().name for path in folders]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in folders]
    if len(set(labels)) < len(labels):
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


# HTML. Every text from a file passes through escape() on its way in; nothing else builds markup from data.


def _page(
    results: Results, images: Mapping[str, Mapping[str, bytes]], examples: Examples, show_generations: bool
) -> str:
    title = "Attacks on " + ", ".join(model.name for model in results.models)
    body = [
        f"<header><h1>Attack report</h1><p>{escape(title)}."
        f"{escape(f' Evaluated {results.created}.') if results.created else ''}</p></header>",
        "<main>",
        section(
            "Results", f"<p>{escape(HOW_TO_READ)}</p>", pairs(results.summary), _results(results), _warnings(results)
        ),
        section("Figures", _figures(results, images)),
        *(_section(found) for found in sections(results)),
        section("Attacks", *_attacks(results)),
        section("Other measures", *_measures(results)),
        section("Examples", *_examples(examples, show_generations)),
        section("Versions", pairs(_versions(results))),
        "</main>",
    ]
    return document(title, body)


def _section(found: Section) -> str:
    paragraphs = [f"<p>{escape(text)}</p>" for text in found.text]
    return section(found.heading, *paragraphs, *(plain_table(one) for one in found.tables))


def _versions(results: Results) -> dict[str, object]:
    """Versions of the libraries and of the suite; those of attacks and judges stand in their table."""
    suite = {f"suite {results.suite['name']}": results.suite.get("version")} if results.suite.get("name") else {}
    return {**suite, **results.versions}


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


def _figures(results: Results, images: Mapping[str, Mapping[str, bytes]]) -> str:
    parts = [
        image(themes, alt_of(name, results), caption_of(name, results)) for name, themes in images.items() if themes
    ]
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _counts(attack: AttackResult) -> list[str]:
    errored = f'<strong class="mark">{attack.n_errored}</strong>' if attack.n_errored else "0"
    return [str(attack.n_scored), errored, str(attack.n_skipped)]


def _attacks(results: Results) -> list[str]:
    rows = [
        (
            "marked" if attack.n_errored else "",
            [
                escape(model.name),
                escape(attack.name),
                escape(attack.kind),
                *_counts(attack),
                f'<div class="budget">{escape(describe(attack.budget)) or "-"}</div>',
                escape(attack.judge) or "-",
                escape(attack.version) or "-",
            ],
        )
        for model in results.models
        for attack in model.attacks.values()
    ]
    if not rows:
        return ["<p>No attack was run.</p>"]
    num_errored = sum(attack.n_errored for model in results.models for attack in model.attacks.values())
    warning = (
        f'<p class="note marked">{num_errored} rows errored and are in no share. Where they are many, the shares are '
        "of the rows that happened to work.</p>"
        if num_errored
        else ""
    )
    head = ["model", "attack", "class", "scored", "errored", "skipped", "budget", "judge", "version"]
    caption = "Rows counted, budget, judge and version of every attack"
    made = table(caption, head, rows)
    if len(rows) > FOLDED:
        made = f"<details><summary>{escape(caption)} ({len(rows)} rows)</summary>{made}</details>"
    return [warning, made]


def _measures(results: Results) -> list[str]:
    parts = []
    rows = []
    for model in results.models:
        for measure in (model.utility, model.over_refusal):
            if measure is not None:
                count = "-" if measure.n is None else str(measure.n)
                rows.append(("", [escape(model.name), escape(measure.name), lines_of(measure_cell(measure)), count]))
    if rows:
        parts.append(table("Utility and over-refusal", ["model", "measure", "value", "n"], rows))
    raw_safety = [
        (model.name, row) for model in results.models for row in model.factor_of_safety if "threshold" not in row
    ]
    for caption, found in (
        ("Coherence", [(model.name, _with_intervals(model.coherence)) for model in results.models if model.coherence]),
        ("Factor of safety", raw_safety),
        (
            "Perplexity",
            [(model.name, _with_intervals(model.perplexity)) for model in results.models if model.perplexity],
        ),
        ("Benchmarks", [(model.name, row) for model in results.models for row in model.benchmarks.values()]),
        ("Unlearning", [(model.name, model.unlearning) for model in results.models if model.unlearning]),
        ("Cost", [(model.name, model.cost) for model in results.models if model.cost]),
    ):
        if found:
            keys = list(dict.fromkeys(str(key) for _, row in found for key in row))
            cells = [[name, *(describe(row.get(key)) for key in keys)] for name, row in found]
            parts.append(plain_table(Table(caption, ["model", *keys], cells)))
    return parts


def _with_intervals(measures: Mapping[str, object]) -> dict[str, object]:
    """Measures with the interval that belongs to each (`x_interval`, or `interval` for the first) below its value."""
    found: dict[str, object] = {}
    first = next(iter(measures), "")
    for key, value in measures.items():
        if key.endswith("interval"):
            continue
        ends: Interval | None = interval_of(measures.get(f"{key}_interval" if key != first else "interval"), key)
        ends = ends or interval_of(measures.get(f"{key}_interval"), key)
        found[key.replace("_", " ")] = describe(value) + (f"\n[{ends[0]:.4g}, {ends[1]:.4g}]" if ends else "")
    return found


def _examples(examples: Examples, show: bool) -> list[str]:
    parts = []
    if examples.rows:
        explained = "The first generation of each outcome, for every model and attack." + (
            "" if show else f" {REDACTED}"
        )
        parts.append(f"<p>{escape(explained)}</p>")
    by_model: dict[str, list[tuple[str, list[str]]]] = {}
    for (model, attack, outcome), row in examples.rows.items():
        texts = [f'<div class="text">{_example_text(text, show)}</div>' for text in (row.prompt, row.response)]
        # A judge's reason may quote the response.
        cells = [escape(attack), escape(outcome), escape(row.id), *texts, _example_text(row.reason, show)]
        by_model.setdefault(model, []).append(("", cells))
    head = ["attack", "outcome", "id", "prompt", "response", "reason"]
    for model, rows in by_model.items():
        made = table(f"Examples of {model}", head, rows)
        parts.append(f"<details><summary>{escape(model)} ({len(rows)} examples)</summary>{made}</details>")
    if examples.num_unreadable:
        parts.append(
            f'<p class="note marked">{examples.num_unreadable} lines of generations.jsonl could not be read; a run '
            "that was killed leaves such a line.</p>"
        )
    return parts


def _example_text(text: str, show: bool) -> str:
    if not text:
        return '<span class="none">empty</span>'
    return escape(shorten(text)) if show else f'<span class="none">{redact(text)}</span>'
