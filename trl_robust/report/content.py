"""Pieces of a report as plain text; the page and the Markdown lay them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """
    A table of plain text.

    Args:
        caption (`str`):
            What it shows.
        head (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence[str]]`):
            Cells; a line break stands between a value and what belongs to it. A line that begins with "! " is a
            warning.
        folded (`bool`, *optional*, defaults to `False`):
            Whether a page shows it only when asked.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """
    A section of the report.

    Args:
        heading (`str`):
            Heading.
        text (`Sequence[str]`):
            Paragraphs.
        figures (`Sequence[str]`):
            Names of the figures below them.
        tables (`Sequence[Table]`):
            Tables below them.
        fold (`str`, *optional*):
            Title under which a page shows all tables when asked; without one they stand as each of them says.
        pairs (`Mapping[str, str]`):
            Names and what is to be said about them, at the end.
        pairs_title (`str`, *optional*):
            What that is.
    """

    heading: str
    text: Sequence[str] = ()
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    fold: str = ""
    pairs: Mapping[str, str] = field(default_factory=dict)
    pairs_title: str = ""
