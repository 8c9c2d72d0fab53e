"""What to change so that a run fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes import Recipe
from .forecast import Estimate, changed, may_checkpoint
from .memory import GIB


@dataclass(frozen=True)
class Change:
    """
    Settings that need less memory.

    Args:
        training (`dict`):
            Settings of the training, by key.
        model (`dict`):
            Settings of the model, by key.
        cost (`str`):
            What the change costs.
    """

    training: dict[str, Any]
    model: dict[str, Any]
    cost: str

    @property
    def words(self) -> str:
        """The change as it would stand on a command line."""
        given = {**self.training, **self.model}
        return " ".join(f"--{name} {str(value).lower()}" for name, value in given.items())


def changes(recipe: Recipe) -> tuple[list[Change], list[Change]]:
    """
    Changes that need less memory.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.

    Returns:
        `tuple`: smaller micro-batches, the larger first, and all others, the cheapest first.
    """
    training, model = recipe.training, recipe.model
    sizes: list[Change] = []
    others: list[Change] = []
    size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    while size % 2 == 0 and size > 1:
        size, accumulated = size // 2, accumulated * 2
        smaller = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        cost = "the same updates; smaller products, which keep a card less busy"
        if training.faithful:
            cost = "fewer rows are attacked, since `faithful` attacks the last micro-batch alone"
        sizes.append(Change(smaller, {}, cost))
    if may_checkpoint(recipe):
        others.append(Change({"activation_checkpointing": True}, {}, "layers run once more in every backward pass"))
    if model.use_peft and not (model.load_in_4bit or model.load_in_8bit):
        quantised = {"load_in_4bit": True, "use_bnb_nested_quant": True}
        if model.dtype not in ("bfloat16", "float16"):
            quantised["dtype"] = "bfloat16"  # type: ignore[assignment]
        others.append(Change({}, quantised, "weights rounded to 4 bits"))
    if training.updates_per_attack > 1:
        kept = "no perturbation is kept for later updates; a search for every update, and another training"
        others.append(Change({"updates_per_attack": 1}, {}, kept))
    return sizes, others


def advice(found: Estimate, memory_gib: float) -> list[str]:
    """
    What to change so that a run fits.

    Args:
        found ([`Estimate`]):
            A run that does not fit.
        memory_gib (`float`):
            Memory there is.

    Returns:
        `list[str]`: each change that is enough alone, the cheapest first; else the changes that are enough together;
        else how far they go.
    """
    sizes, others = changes(found.recipe)

    def peak(*chosen: Change) -> float:
        return found_with(found, chosen).memory.peak / GIB

    alone = []
    if sizes and peak(sizes[-1]) <= memory_gib:
        alone.append(next(size for size in sizes if peak(size) <= memory_gib))  # the largest that is enough
    alone += [other for other in others if peak(other) <= memory_gib]
    if alone:
        return [f"{change.words}: {shown(peak(change))} ({change.cost})" for change in alone]
    if not sizes and not others:
        return _beyond(found)
    smallest = sizes[-1:]
    for count in range(1, len(others) + 1):
        if peak(*smallest, *others[:count]) > memory_gib:
            continue
        tried = ([*size, *others[:count]] for size in ([], *([size] for size in sizes)))
        chosen = next(changes for changes in tried if peak(*changes) <= memory_gib)
        words = " ".join(change.words for change in chosen)
        return [f"{words}: {shown(peak(*chosen))}, none of these alone being enough"]
    everything = [*smallest, *others]
    words = " ".join(change.words for change in everything)
    return [f"{words} together leave {shown(peak(*everything))}, which is still too much", *_beyond(found)]


def shown(gib: float) -> str:
    """
    An amount of memory as text.

    Args:
        gib (`float`):
            In GiB.

    Returns:
        `str`.
    """
    return f"{gib:.1f} GiB" if gib >= 10 else f"{gib:.2f} GiB"


def found_with(found: Estimate, chosen: Sequence[Change]) -> Estimate:
    """
    The same estimate with some changes.

    Args:
        found ([`Estimate`]):
            What is changed.
        chosen (sequence of [`Change`]):
            Changes.

    Returns:
        [`Estimate`].
    """
    training: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for change in chosen:
        training |= change.training
        model |= change.model
    return changed(found, training, model)


def _beyond(found: Estimate) -> list[str]:
    adapters = [] if found.blueprint.peft_config else ["train adapters (--use_peft true) instead of all weights"]
    return [*adapters, "shorter rows (--max_length), or a smaller model"]
