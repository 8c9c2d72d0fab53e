"""From the datasets a recipe names to the columns that are trained on."""

from .collator import LATDataCollator
from .errors import DataError
from .preference import as_prompt_completion, check_none_lost, join_benign, last_user_span

__all__ = ["DataError", "LATDataCollator", "as_prompt_completion", "check_none_lost", "join_benign", "last_user_span"]
