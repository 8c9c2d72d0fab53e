"""Memory and time of a run before anything is loaded.

- `shapes`: the model on the meta device, and what of it is trained.
- `lengths`, `schedule`: how long the rows are, how many of them are trained on and attacked.
- `passes`, `steps`: what is run over them; forward passes and FLOPs.
- `rehearsal`, `memory`: what that keeps in memory.
- `forecast` puts these together, `advice` looks for changes that make a run fit, `table` writes it out.
"""

from .cards import CARDS, Card, card_named
from .forecast import Estimate, blueprint_of, estimate
from .lengths import Rows, find_rows
from .shapes import find_config
from .table import describe

__all__ = [
    "CARDS",
    "Card",
    "Estimate",
    "Rows",
    "blueprint_of",
    "card_named",
    "describe",
    "estimate",
    "find_config",
    "find_rows",
]
