"""The report of an evaluation: `report.html` in one file, `report.md`, and the figures beside them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from .examples import REDACTED, Examples, redact, shorten
from .figures import THEMES, compared_attacks, draw_success, draw_trade_off, encode, mean_success
from .reading import (
    AttackResult,
    ModelResult,
    Results,
    describe,
    read_results,
    side_by_side,
)
from .tables import NOTE, attack_cell, markdown_rows, markdown_table, markdown_text, measure_cell

HOW_TO_READ = (
    "Every value is a share between 0 and 1 with its interval. Attack success counts the prompts on which the attack "
    "got what it was after; lower is safer. Rows that errored or were skipped are in no share: they are counted in "
    "the section on attacks."
)


def write_report(
    folder: str | Path,
    *,
    sources: Sequence[str | Path] | None = None,
    show_generations: bool = False,
) -> Path:
    """
    Writes `report.html`, `report.md` and `figures/` into `folder`, from files on disk alone.

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
    for name, draw in (("attack_success", draw_success), ("trade_off", draw_trade_off)):
        drawn = {theme: draw(results, colours) for theme, colours in THEMES.items()} if results.attack_names else {}
        images[name] = {theme: encode(figure, "svg") for theme, figure in drawn.items() if figure is not None}
        light = drawn.get("light")
        for form in ("png", "svg"):
            path = figures / f"{name}.{form}"
            if light is None:
                path.unlink(missing_ok=True)  # one from an earlier report would not belong to this one
            else:
                path.write_bytes(images[name]["light"] if form == "svg" else encode(light, "png"))
    (folder / "report.md").write_text(_markdown(results, {k for k, v in images.items() if v}), encoding="utf-8")
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
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    title = "Attacks on " + ", ".join(model.name for model in results.models)
    body = [
        f"<header><h1>Attack report</h1><p>{escape(title)}."
        f"{escape(f' Evaluated {results.created}.') if results.created else ''}</p></header>",
        "<main>",
        _section(
            "Results", f"<p>{escape(HOW_TO_READ)}</p>", _pairs(results.summary), _results(results), _warnings(results)
        ),
        _section("Figures", *_figures(results, images)),
        _section("Attacks", *_attacks(results)),
        _section("Other measures", *_measures(results)),
        _section("Examples", *_examples(examples, show_generations)),
        _section("Versions", _pairs(results.versions)),
        "</main>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n"
        "</html>\n"
    )


def _section(heading: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def _table(caption: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table in a box that scrolls by itself. `rows` are (class of the row, cells as HTML), the row's head first."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr{f" class={kind}" if kind else ""}><th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>\n"
        for kind, (first, *cells) in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption><span>{escape(caption)}</span></caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody>\n"
        "</table></div>"
    )


def _pairs(values: Mapping[str, object]) -> str:
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(describe(value))}</dd>\n" for key, value in values.items()
    )
    return f"<dl>\n{items}</dl>" if items else ""


def _lines(cell: Sequence[str]) -> str:
    first, *rest = (escape(line) for line in cell)
    if first in ("not run", "no score", "-"):
        first = f'<span class="none">{first}</span>'
    marked = [
        f'<strong class="mark">{line}</strong>' if "errored" in line else f"<small>{line}</small>" for line in rest
    ]
    return "<br>".join([first, *marked])


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
                *(_lines(attack_cell(model.attacks.get(name))) for name in names),
                _lines(measure_cell(model.utility)),
                _lines(measure_cell(model.over_refusal)),
            ],
        )
        for model in results.models
    ]
    head = ["model", *names, "utility", "over-refusal"]
    return _table("Attack success by attack, utility and over-refusal, with intervals", head, rows)


def _warnings(results: Results) -> str:
    marked = [model.name for model in results.models if model.warnings]
    named = f" Marked for this: {', '.join(marked)}." if marked else ""
    return f'<p class="{"note marked" if marked else "note"}">{escape(NOTE + named)}</p>'


def _figures(results: Results, images: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    said = []
    for model in results.models:
        values = (f"{name} {' '.join(attack_cell(attack))}" for name, attack in model.attacks.items())
        said.append(f"{model.name}: {', '.join(values)}.")
    parts = [
        _image(images["attack_success"], f"Attack success by attack and model. {' '.join(said)}", SUCCESS_CAPTION),
        _image(images["trade_off"], _trade_off_alt(results), _trade_off_caption(results)),
    ]
    return [f'<div class="figures">{"".join(parts)}</div>'] if any(parts) else []


SUCCESS_CAPTION = "Attack success by attack. Lines are intervals; the value stands at the right."


def _trade_off_caption(results: Results) -> str:
    attacks = compared_attacks(results)
    missing = [model.name for model in results.models if mean_success(model, attacks) is None]
    return (
        f"Mean success over {', '.join(attacks)}, which every attacked model was scored on, against utility and "
        "over-refusal. A robust and useful model lies at the top left above and at the bottom left below."
        + (f" Not drawn, since not attacked: {', '.join(missing)}." if missing else "")
    )


def _trade_off_alt(results: Results) -> str:
    attacks = compared_attacks(results)
    said = []
    for model in results.models:
        mean = mean_success(model, attacks)
        if mean is not None:
            utility, over_refusal = measure_cell(model.utility)[0], measure_cell(model.over_refusal)[0]
            said.append(f"{model.name}: mean success {mean:.2f}, utility {utility}, over-refusal {over_refusal}.")
    return f"Mean attack success against utility and over-refusal. {' '.join(said)}"


def _image(themes: Mapping[str, bytes], alt: str, caption: str) -> str:
    if not themes:
        return ""
    data = {theme: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for theme, svg in themes.items()}
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img src="{data["light"]}" alt="{escape(alt)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


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
    return [warning, _table("Rows counted, budget, judge and version of every attack", head, rows)]


def _measures(results: Results) -> list[str]:
    parts = []
    rows = []
    for model in results.models:
        for measure in (model.utility, model.over_refusal):
            if measure is not None:
                count = "-" if measure.n is None else str(measure.n)
                rows.append(("", [escape(model.name), escape(measure.name), _lines(measure_cell(measure)), count]))
    if rows:
        parts.append(_table("Utility and over-refusal", ["model", "measure", "value", "n"], rows))
    for caption, found in (
        ("Coherence", [(model.name, model.coherence) for model in results.models if model.coherence]),
        ("Factor of safety", [(model.name, row) for model in results.models for row in model.factor_of_safety]),
        ("Cost", [(model.name, model.cost) for model in results.models if model.cost]),
    ):
        if found:
            keys = list(dict.fromkeys(str(key) for _, row in found for key in row))
            rows = [("", [escape(name), *(escape(describe(row.get(key))) for key in keys)]) for name, row in found]
            parts.append(_table(caption, ["model", *keys], rows))
    return parts


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
        table = _table(f"Examples of {model}", head, rows)
        parts.append(f"<details><summary>{escape(model)} ({len(rows)} examples)</summary>{table}</details>")
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


# Markdown


def _markdown(results: Results, drawn: set[str]) -> str:
    parts = ["# Attack report\n"]
    if results.created:
        parts.append(f"Evaluated {markdown_text(results.created)}.\n")
    parts += [f"{HOW_TO_READ}\n", markdown_table(results), f"{NOTE}\n"]
    described = [model for model in results.models if model.description]
    if described:
        parts.append("".join(f"- {markdown_text(f'{model.name}: {model.description}')}\n" for model in described))
    for name, alt, caption in (
        ("attack_success", "Attack success by attack and model", SUCCESS_CAPTION),
        ("trade_off", "Mean attack success against utility and over-refusal", _trade_off_caption(results)),
    ):
        if name in drawn:
            parts.append(f"![{alt}](figures/{name}.png)\n\n{markdown_text(caption)}\n")
    rows = [
        [
            model.name, attack.name, attack.kind, str(attack.n_scored), str(attack.n_errored), str(attack.n_skipped),
            describe(attack.budget), attack.judge, attack.version,
        ]
        for model in results.models
        for attack in model.attacks.values()
    ]  # fmt: skip
    head = ["model", "attack", "class", "scored", "errored", "skipped", "budget", "judge", "version"]
    if rows:
        parts.append("## Attacks\n\n" + markdown_rows(head, rows))
    if results.versions:
        parts.append(
            "## Versions\n\n" + markdown_rows(["", "version"], [[k, describe(v)] for k, v in results.versions.items()])
        )
    return "\n".join(parts)
