"""Which settings of a selection of rows never come into effect; see `same.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .same import Effect

WITHOUT_MODEL = ("none", "random", "dsir", "safe_instr")
"""Ways to choose that look at the rows alone."""
OF_SAFE = ("safe_dataset_name", "safe_dataset_config", "safe_dataset_split", "safe_datasets")


def drop_unread_of_selections(training: Any, found: Effect) -> None:
    """
    Takes out what nothing reads.

    Args:
        training ([`~trl_robust.SEALConfig`]):
            Settings of a cell.
        found ([`Effect`]):
            What comes into effect; changed.
    """
    method = training.selection_method
    selector, penalty, pairs = (
        [name for name in found.settings if name.startswith(start)]
        for start in ("selector_", "penalty_", "preference_")
    )
    if method == "seal":
        if training.selector_function == "softmax":
            found.drop(["selector_normalized"], "the weights of a softmax have mean 1 in any case")
        if training.penalty_increment == 0 and training.penalty_strength <= training.penalty_max:
            found.drop(["penalty_max"], "the penalty stays below it")
        return
    found.drop(selector, f"`{method}` learns no weights")
    if method in WITHOUT_MODEL:
        found.drop([*penalty, *pairs, "safe_fraction"], f"`{method}` trains no model")
    elif method == "safe_loss":
        found.drop(penalty, "`safe_loss` trains on the safe set alone")
    else:
        found.drop(["penalty_algorithm"], "`loss_gap` has a second model in any case")
    if method in ("none", "safe_instr"):
        found.drop(["keep_fraction"], f"`{method}` keeps all rows")
    if method in ("none", "random"):
        found.drop(OF_SAFE, f"`{method}` does not look at the safe set")
