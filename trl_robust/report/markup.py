"""Pieces of HTML. Every text from a file passes through `escape` here or where a piece is made of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from .content import Table
from .values import describe

WIDE = "64rem"
"""Width of the window from which on a figure may have panels side by side."""


LONG = 28
"""Characters up to which what stands below a value is kept on one line."""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page with the package's style: one file, which asks nothing of the network and runs no script."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section with its heading; nothing without content."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def table(caption: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table in a box that scrolls by itself. `rows` are (class of the row, cells as HTML), the row's head first."""
    columns = "".join(f'<th scope="col">{breakable(name)}</th>' for name in head)
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


def pairs(values: Mapping[str, object], *, sentences: bool = False) -> str:
    """Names and values as a list; nothing without any. On a phone sentences stand below their names."""
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(describe(value))}</dd>\n" for key, value in values.items()
    )
    kind = ' class="sentences"' if sentences else ""
    return f"<dl{kind}>\n{items}</dl>" if items else ""


def breakable(text: str) -> str:
    """Text that may be broken after an underscore, where names of attacks would make a column too wide."""
    return escape(text).replace("_", "_<wbr>")


def lines_of(cell: Sequence[str]) -> str:
    """Lines of a cell: a value, and below it smaller what belongs to it; what errored and warnings are marked."""
    first, *rest = cell
    shown = breakable(first)
    if first in ("not run", "no score", "destroyed", "-"):
        shown = f'<span class="none">{shown}</span>'
    elif "errored" in first:
        shown = f'<strong class="mark">{shown}</strong>'
    return "<br>".join([shown, *(_below(line) for line in rest)])


def _below(line: str) -> str:
    if "errored" in line or line.startswith("! "):
        return f'<strong class="mark">{breakable(line)}</strong>'
    kind = ' class="long"' if len(line) > LONG else ""
    return f"<small{kind}>{breakable(line)}</small>"


def image(themes: Mapping[str, bytes], alt: str, caption: str) -> str:
    """
    A figure in both themes, inside the page; nothing where there is none.

    Args:
        themes (`Mapping[str, bytes]`):
            SVG by theme, `"light"` and `"dark"`; under `"wide light"` and `"wide dark"` those of a wide screen, if
            there are such.
        alt (`str`):
            What it shows, in words.
        caption (`str`):
            Caption.

    Returns:
        `str`.
    """
    if not themes:
        return ""
    data = {theme: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for theme, svg in themes.items()}
    wide, dark = f"(min-width: {WIDE})", "(prefers-color-scheme: dark)"
    media = {"wide dark": f"{wide} and {dark}", "wide light": wide, "dark": dark}
    sources = "".join(f'<source media="{media[theme]}" srcset="{data[theme]}">' for theme in media if theme in data)
    kind = ' class="wide"' if "wide light" in themes else ""
    return (
        f'<figure{kind}><picture>{sources}<img src="{data["light"]}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def plain_table(found: Table) -> str:
    """A table of plain text; a folded one opens on demand. A row whose head carries a warning is marked."""
    rows = [("marked" if "\n! " in row[0] else "", [lines_of(cell.split("\n")) for cell in row]) for row in found.rows]
    made = table(found.caption, found.head, rows)
    return folded(found.caption, made) if found.folded else made


def folded(title: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
