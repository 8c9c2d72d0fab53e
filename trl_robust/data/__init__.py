"""From the datasets a recipe names to the columns that are trained on."""

from .collator import LATDataCollator
from .errors import DataError
from .loading import as_conversation, content_hash, is_local, load_rows, where_looked
from .preference import as_prompt_completion, check_none_lost, join_benign, last_user_span

__all__ = [
    "DataError",
    "LATDataCollator",
    "as_conversation",
    "as_prompt_completion",
    "check_none_lost",
    "content_hash",
    "is_local",
    "join_benign",
    "last_user_span",
    "load_rows",
    "where_looked",
]
