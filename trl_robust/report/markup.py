"""Pieces of HTML. Every text from a file passes through `escape` here or where a piece is made of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from .sections import Table
from .values import describe


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


def pairs(values: Mapping[str, object]) -> str:
    """Names and values as a list; nothing without any."""
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(describe(value))}</dd>\n" for key, value in values.items()
    )
    return f"<dl>\n{items}</dl>" if items else ""


def lines_of(cell: Sequence[str]) -> str:
    """Lines of a cell: a value, and below it smaller what belongs to it."""
    first, *rest = (escape(line) for line in cell)
    if first in ("not run", "no score", "destroyed", "-"):
        first = f'<span class="none">{first}</span>'
    marked = [
        f'<strong class="mark">{line}</strong>' if "errored" in line else f"<small>{line}</small>" for line in rest
    ]
    return "<br>".join([first, *marked])


def image(themes: Mapping[str, bytes], alt: str, caption: str) -> str:
    """A figure in both themes, inside the page; nothing where there is none."""
    if not themes:
        return ""
    data = {theme: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for theme, svg in themes.items()}
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img src="{data["light"]}" alt="{escape(alt)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def plain_table(found: Table) -> str:
    """A table of plain text; a folded one opens on demand."""
    rows = [("", [lines_of(cell.split("\n")) for cell in row]) for row in found.rows]
    made = table(found.caption, found.head, rows)
    return f"<details><summary>{escape(found.caption)}</summary>{made}</details>" if found.folded else made
