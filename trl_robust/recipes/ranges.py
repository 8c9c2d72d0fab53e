"""Numbers that have the right type and cannot be."""

from __future__ import annotations

import math

from .arguments import Recipe

RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "max_length": (1, math.inf),
    "seed": (0, 2**32 - 1),
}
"""Keys of TRL and transformers that neither checks, with the least and the largest value."""


def check_ranges(recipe: Recipe) -> list[str]:
    """
    Looks for numbers that training would stumble over after the model is loaded.

    Args:
        recipe ([`Recipe`]):
            Settings.

    Returns:
        `list[str]`: one sentence for each such number.
    """
    faults = []
    for name, (least, largest) in RANGES.items():
        value = getattr(recipe.training, name)
        if value is not None and not (least <= value <= largest and math.isfinite(value)):
            needed = f"at least {least}" if largest == math.inf else f"from {least} to {largest}"
            faults.append(f"`{name}` is {value}; it must be {needed}.")
    return faults


def block_of(recipe: Recipe) -> int:
    """
    Rows of the training dataset that one update takes.

    Args:
        recipe ([`Recipe`]):
            Settings.

    Returns:
        `int`: batch size x gradient accumulation x processes, those to be launched or those there are.
    """
    training = recipe.training
    # A configuration that has failed its own checks knows of no processes.
    there = training.world_size if getattr(training, "distributed_state", None) is not None else 1
    processes = max(there, int(recipe.launch.get("num_processes") or 1))
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
