"""Tables, figures and the page of an evaluation. Reads files only, so that what old runs wrote stays readable."""

from .card import write_card_section
from .page import write_report
from .tables import markdown_table, results_table

__all__ = ["markdown_table", "results_table", "write_card_section", "write_report"]
