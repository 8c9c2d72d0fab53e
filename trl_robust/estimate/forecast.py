"""Memory and work of a run, put together from its recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..recipes import Recipe
from ..recipes.ranges import block_of
from ..recipes.rows import named
from ..threat.sites import resolve_sites
from .lengths import Rows
from .memory import Memory, memory_of, modes_of
from .passes import PARTS, Pass
from .rehearsal import Modes, Rehearsal
from .schedule import Schedule, schedule_of
from .shapes import Blueprint, Shape, compute_dtype, shape_of
from .steps import measuring, rmu_layers, step_passes


@dataclass(frozen=True)
class Work:
    """
    Work of a part of the step.

    Args:
        forward_passes (`float`):
            As the trainers count them, in the whole run, over all processes.
        flops (`float`):
            Floating-point operations in the whole run, over all processes.
    """

    forward_passes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward_passes + other.forward_passes, self.flops + other.flops)


@dataclass(frozen=True)
class Estimate:
    """
    What a recipe will cost, counted.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            The recipe.
        blueprint ([`Blueprint`]):
            Of its model.
        shape ([`Shape`]):
            Of its model.
        rows ([`Rows`]):
            Lengths of its rows.
        schedule ([`Schedule`]):
            Updates and rows of the run.
        passes (`list[Pass]`):
            Of a step.
        memory ([`Memory`]):
            On one card.
        work (`dict[str, Work]`):
            By part of the step; of the whole run, or, where its length is not known, of as many updates as one attack
            serves.
        modes ([`Modes`]):
            How the run computes.
        rehearsals (`dict`):
            What the memory was counted on, for the same estimate with other settings.
    """

    recipe: Recipe
    blueprint: Blueprint
    shape: Shape
    rows: Rows
    schedule: Schedule
    passes: list[Pass]
    memory: Memory
    work: dict[str, Work]
    modes: Modes
    rehearsals: dict[Any, Rehearsal]

    @property
    def half(self) -> bool:
        """Whether it computes in 16 bits."""
        return bool(self.modes.autocast) or self.blueprint.dtype.itemsize == 2

    @property
    def total(self) -> Work:
        """All parts together."""
        return sum(self.work.values(), Work())

    @property
    def updates(self) -> int:
        """Updates that `work` is of."""
        return self.schedule.updates or self.recipe.training.updates_per_attack

    def seconds(self, rate: float) -> float:
        """
        Time of the run's arithmetic.

        Args:
            rate (`float`):
                Of one card, in TFLOP/s.

        Returns:
            `float`: seconds.
        """
        return self.total.flops / (rate * 1e12 * self.schedule.processes)


def blueprint_of(recipe: Recipe, config: Any, peft_config: Any = None) -> Blueprint:
    """
    What a recipe's model is made of.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters.

    Returns:
        [`Blueprint`].
    """
    training, model = recipe.training, recipe.model
    depth = config.get_text_config().num_hidden_layers
    layers = [int(layer) for layer in resolve_sites(training.trained_layers, depth)] if training.trained_layers else []
    last = rmu_layers(training, depth) if recipe.verb == "lat-rmu" else None
    modules = training.trained_modules
    if last is not None and peft_config is not None:
        modules = []  # the adapters are all that is trained
    elif last is not None and not layers:
        layers = list(range(max(0, last - 3), last))
    return Blueprint(
        config,
        compute_dtype(recipe, config),
        quantized=model.load_in_4bit or model.load_in_8bit,
        # All others keep queries, keys, values and outputs, as the usual one does.
        attention="eager" if model.attn_implementation == "eager" else None,
        peft_config=peft_config,
        trained_layers=tuple(map(str, layers)),
        trained_modules=tuple(modules),
        frozen_above=last - 1 if last is not None and peft_config is not None else None,
    )


def estimate(recipe: Recipe, blueprint: Blueprint, rows: Rows, *, on_card: bool = True) -> Estimate:
    """
    Counts what a recipe will cost. Nothing is loaded, and nothing is computed but shapes.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        blueprint ([`Blueprint`]):
            Of its model.
        rows ([`Rows`]):
            Lengths of its rows.
        on_card (`bool`, *optional*, defaults to `True`):
            Whether it is to run on a card, even if it has `use_cpu`.

    Returns:
        [`Estimate`].
    """
    return _estimate(recipe, blueprint, rows, modes_of(recipe, on_card), {})


def changed(found: Estimate, training: Mapping[str, Any], model: Mapping[str, Any]) -> Estimate:
    """
    The same estimate with other settings.

    Args:
        found ([`Estimate`]):
            What is changed.
        training (`Mapping`):
            Settings of the training, by key.
        model (`Mapping`):
            Settings of the model, by key.

    Returns:
        [`Estimate`].
    """
    recipe = replace(found.recipe, training=copy.copy(found.recipe.training), model=copy.copy(found.recipe.model))
    for settings, values in ((recipe.training, training), (recipe.model, model)):
        for name, value in values.items():
            setattr(settings, name, value)
    blueprint = replace(found.blueprint, quantized=recipe.model.load_in_4bit or recipe.model.load_in_8bit)
    if "dtype" in model:
        blueprint = replace(blueprint, dtype=compute_dtype(recipe, blueprint.config))
    modes = replace(found.modes, checkpointing=bool(recipe.training.activation_checkpointing))
    return _estimate(recipe, blueprint, found.rows, modes, found.rehearsals)


def may_checkpoint(recipe: Recipe) -> bool:
    """Whether a recipe that does not checkpoint activations could; the trainers refuse it where MLPs are perturbed."""
    training = recipe.training
    return not training.activation_checkpointing and not (training.attack_stream == "mlp" and training.attacks)


def _estimate(
    recipe: Recipe, blueprint: Blueprint, rows: Rows, modes: Modes, rehearsals: dict[Any, Rehearsal]
) -> Estimate:
    training = recipe.training
    model = blueprint.model()
    shape = shape_of(model)
    rehearsal = rehearsals.setdefault((modes, blueprint.quantized, blueprint.dtype), Rehearsal(blueprint, modes))
    passes = step_passes(recipe.verb, training, shape.depth, bool(named(recipe, "benign")))
    batch = training.per_device_train_batch_size
    processes = max(block_of(recipe) // (batch * training.gradient_accumulation_steps), 1)
    schedule = schedule_of(training, rows.counts.get("train"), processes)
    work = dict.fromkeys(PARTS, Work())
    over = [(one, schedule.attacked if one.part == "attack" else schedule.rows) for one in passes]
    over += [
        (one, count * processes) for one, count in measuring(training, schedule.updates, rows.counts.get("train"))
    ]
    for one, count in over:
        batches = rows.batches(one.share, one.rows * batch)
        flops = [
            one.flops(shape, lengths, checkpointing=modes.checkpointing, all_positions=modes.on_cpu)
            for lengths in batches
        ]
        each = sum(flops) / len(flops) / batch
        work[one.part] += Work(count * one.forward_passes(shape.depth), count * each)
    return Estimate(
        recipe=recipe,
        blueprint=blueprint,
        shape=shape,
        rows=rows,
        schedule=schedule,
        passes=passes,
        memory=memory_of(recipe, model, shape, rows, passes, schedule, rehearsal),
        work=work,
        modes=modes,
        rehearsals=rehearsals,
    )
