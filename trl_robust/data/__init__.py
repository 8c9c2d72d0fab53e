"""From the datasets a recipe names to the columns that are trained on."""

from .collator import LATDataCollator, PreferenceCollator
from .corpora import generic_label_rows, is_corpus_pairs, is_generic_labels, pair_corpora
from .errors import DataError
from .hashing import add_row_hashes, row_hash, row_hashes
from .loading import as_conversation, content_hash, is_local, load_rows, where_looked
from .preference import (
    add_user_spans,
    as_prompt_completion,
    check_none_lost,
    join_benign,
    kept_whole,
    prompt_inside,
    take_prompt_out,
    user_spans,
)
from .row_weights import check_row_weights

__all__ = [
    "DataError",
    "LATDataCollator",
    "PreferenceCollator",
    "add_row_hashes",
    "add_user_spans",
    "as_conversation",
    "as_prompt_completion",
    "check_none_lost",
    "check_row_weights",
    "content_hash",
    "generic_label_rows",
    "is_corpus_pairs",
    "is_generic_labels",
    "is_local",
    "join_benign",
    "kept_whole",
    "load_rows",
    "pair_corpora",
    "prompt_inside",
    "row_hash",
    "row_hashes",
    "take_prompt_out",
    "user_spans",
    "where_looked",
]
