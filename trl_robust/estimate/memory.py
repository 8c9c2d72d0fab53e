"""Where a run's memory goes: what is always there, and what an attack and an update need on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..recipes import Recipe
from ..recipes.shares import is_adapter
from ..threat.sites import base_model, resolve_sites
from .lengths import Rows
from .passes import Pass, prefix_of
from .rehearsal import Held, Modes, Rehearsal
from .schedule import Schedule
from .shapes import Blueprint, Shape, of_adapter

GIB = 2**30

CONTEXT_GIB = 0.75
"""What CUDA and its libraries take on a card. Assumed."""

FRAGMENTATION = 0.05
"""Share of what comes and goes that the allocator holds besides. Assumed."""

NF4_BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in bitsandbytes' 4-bit format, and scales that share one with double quantisation."""


@dataclass(frozen=True)
class Line:
    """
    One line of the table.

    Args:
        name (`str`):
            What needs memory.
        attack (`float`):
            Bytes while a perturbation is searched for.
        update (`float`):
            Bytes in the forward and backward pass of an update.
    """

    name: str
    attack: float
    update: float


@dataclass(frozen=True)
class Memory:
    """
    The memory of a run on one card.

    Args:
        lines (`list[Line]`):
            Where it goes.
    """

    lines: list[Line]

    @property
    def attack(self) -> float:
        return sum(line.attack for line in self.lines)

    @property
    def update(self) -> float:
        return sum(line.update for line in self.lines)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return max(self.attack, self.update)

    def of(self, name: str) -> Line:
        """The line whose name starts with `name`."""
        return next(line for line in self.lines if line.name.startswith(name))


def weight_bytes(model: Any, shape: Shape, recipe: Recipe) -> tuple[float, float]:
    """
    What the weights of a model take.

    Args:
        model (`nn.Module`):
            On the meta device, adapters included.
        shape ([`Shape`]):
            Of the model.
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.

    Returns:
        `tuple`: bytes of the model's own weights, and of its adapters.
    """
    own = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not of_adapter(name))
    adapters = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if of_adapter(name))
    settings = recipe.model
    if settings.load_in_4bit or settings.load_in_8bit:
        size = next(base_model(model).get_output_embeddings().parameters()).element_size()
        own -= shape.linear * size
        if settings.load_in_8bit:
            own += shape.linear + 4 * shape.linear_rows  # int8, and a scale for every row
        else:
            blocks = shape.linear / NF4_BLOCK
            own += shape.linear / 2 + (
                blocks + 4 * blocks / NESTED_BLOCK if settings.use_bnb_nested_quant else 4 * blocks
            )
    return own, adapters


def optimizer_bytes(optim: str, parameters: Sequence[Any]) -> float:
    """
    What an optimiser keeps of some parameters.

    Args:
        optim (`str`):
            Name, as the key `optim` takes it.
        parameters (sequence of `torch.nn.Parameter`):
            What is trained.

    Returns:
        `float`: bytes. Optimisers that are not known here count as AdamW.
    """
    if optim == "adafactor":
        return sum(4.0 * (sum(p.shape[-2:]) if p.dim() > 1 else p.numel()) for p in parameters)
    if optim in ("sgd", "adagrad"):
        return 0.0 if optim == "sgd" else sum(p.numel() * p.element_size() for p in parameters)
    moments = 1 if "lion" in optim else 2
    if "8bit" in optim:
        # bitsandbytes keeps the state of small tensors in float32.
        return sum(moments * p.numel() * (1.0 if p.numel() >= 4096 else 4.0) for p in parameters)
    if "4bit" in optim:
        return sum(moments * p.numel() / 2 for p in parameters)
    return float(moments * sum(p.numel() * p.element_size() for p in parameters))


def memory_of(
    recipe: Recipe,
    model: Any,
    shape: Shape,
    rows: Rows,
    passes: Sequence[Pass],
    schedule: Schedule,
    rehearsal: Rehearsal,
) -> Memory:
    """
    Adds a run's memory up, on one card.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        model (`nn.Module`):
            On the meta device, adapters included.
        shape ([`Shape`]):
            Of the model.
        rows ([`Rows`]):
            Lengths of the rows.
        passes (sequence of [`Pass`]):
            Of a step.
        schedule ([`Schedule`]):
            Of the run.
        rehearsal ([`Rehearsal`]):
            Of the model, in the modes of the run.

    Returns:
        [`Memory`].
    """
    training = recipe.training
    blueprint = rehearsal.blueprint
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = float(sum(p.numel() * p.element_size() for p in trained))
    own, adapters = weight_bytes(model, shape, recipe)
    optim = str(getattr(training.optim, "value", training.optim))
    lines = [
        Line(weights_name(recipe, blueprint), own, own),
        Line("adapters", adapters, adapters),
        Line("gradients", trained_bytes if schedule.accumulated > 1 else 0.0, trained_bytes),
        Line(f"optimiser state ({optim})", *[optimizer_bytes(optim, trained)] * 2),
        _reference(recipe, own, trained_bytes, bool(adapters)),
    ]
    if schedule.processes > 1:
        lines.append(Line("buckets of gradients (DDP)", trained_bytes, trained_bytes))
    attack, update = _attack(recipe, shape, rows, passes, rehearsal), _update(recipe, shape, rows, passes, rehearsal)
    lines.append(_perturbations(recipe, shape, rows, passes, blueprint))
    temporary = _dequantised(recipe, shape)
    checkpointed = ", checkpointed" if rehearsal.modes.checkpointing else ""
    lines += [
        Line(f"activations that wait{checkpointed}", attack.layers, update.layers),
        Line("logits at labelled positions", attack.losses, update.losses),
        Line(
            "gradients of activations and logits, at the worst moment",
            attack.peak - attack.layers - attack.losses + temporary,
            update.peak - update.layers - update.losses + temporary,
        ),
    ]
    if not rehearsal.modes.on_cpu:
        comes = [CONTEXT_GIB * GIB + FRAGMENTATION * (held.peak + temporary) for held in (attack, update)]
        lines.append(Line("CUDA and fragmentation (assumed)", *comes))
    return Memory(lines if attack.peak else [Line(line.name, 0.0, line.update) for line in lines])


def weights_name(recipe: Recipe, blueprint: Blueprint) -> str:
    """What the weights are kept in, for the table."""
    dtype = str(blueprint.dtype).removeprefix("torch.")
    if recipe.model.load_in_4bit:
        nested = ", double quantisation" if recipe.model.use_bnb_nested_quant else ""
        return f"weights ({recipe.model.bnb_4bit_quant_type.upper()}{nested}; embeddings and head {dtype})"
    return f"weights ({'int8; embeddings and head ' if recipe.model.load_in_8bit else ''}{dtype})"


def _reference(recipe: Recipe, own: float, trained: float, has_adapters: bool) -> Line:
    training = recipe.training
    if recipe.verb == "lat-dpo":
        if has_adapters and is_adapter(Path(str(recipe.model.model_name_or_path)).expanduser()):
            return Line("reference (a copy of the adapter)", trained, trained)
        if has_adapters or training.precompute_ref_log_probs:
            name = "adapters off" if has_adapters else "precomputed"
            kept = trained if training.kl_coef and not has_adapters else 0.0
            return Line(f"reference ({name})", kept, kept)
        kept = own + (trained if training.kl_coef else 0.0)
        return Line("reference (a second model)", kept, kept)
    needed = recipe.verb == "lat-rmu" or training.kl_coef
    if not needed:
        return Line("reference (none)", 0.0, 0.0)
    if has_adapters:
        return Line("reference (adapters off)", 0.0, 0.0)
    return Line("reference (copies of trained weights)", trained, trained)


def _perturbations(recipe: Recipe, shape: Shape, rows: Rows, passes: Sequence[Pass], blueprint: Blueprint) -> Line:
    training = recipe.training
    attack = [one for one in passes if one.part == "attack"]
    if not attack:
        return Line("perturbations (none)", 0.0, 0.0)
    sites = resolve_sites(training.attack_sites, shape.depth)
    count = len(sites)
    kept = count if training.attack_site_choice == "all" else min(count, training.attack_num_sites)
    size, positions = training.per_device_train_batch_size, training.attack_positions
    ranks = rows.longest(attack[0].share, size, positions).ranks
    one = 4.0 * size * ranks * shape.hidden
    # Kept for the updates that follow: those of all micro-batches.
    batches = 1 if training.faithful else training.gradient_accumulation_steps
    held = one * kept * batches if training.updates_per_attack > 1 else 0.0
    moments = 2 if training.attack_optimizer == "adamw" and training.attack_objective != "random" else 0
    # Itself, the sum of its gradients and the latest of them, at every site that is looked at.
    searched = one * (count if training.attack_site_choice == "gradient" else kept) * (3 + moments)
    cached = 0.0
    for term in {(term.share, term.rows): term for term in attack if term.below >= 1}.values():
        lengths = rows.longest(term.share, term.rows * size, positions)
        cached += lengths.rows * lengths.width * shape.hidden * blueprint.dtype.itemsize
    ours = f"perturbations ({kept} site{'s' if kept > 1 else ''}, float32)"
    return Line(ours, held + searched + cached, held or one * kept)


def _attack(recipe: Recipe, shape: Shape, rows: Rows, passes: Sequence[Pass], rehearsal: Rehearsal) -> Held:
    """The term of the attack that needs most; nothing where no gradient is taken."""
    training = recipe.training
    found = [Held()]
    for term in (one for one in passes if one.part == "attack" and one.back):
        lengths = rows.longest(term.share, term.rows * training.per_device_train_batch_size, training.attack_positions)
        below = int(term.below)
        if training.attack_site_choice != "all":  # the lowest may be among the chosen
            below = prefix_of(resolve_sites(training.attack_sites, shape.depth), training.attack_stream)
        found.append(rehearsal.attack(shape.depth - below, lengths, term.losses[0], copies=term.rows))
    return max(found, key=lambda held: held.peak)


def _update(recipe: Recipe, shape: Shape, rows: Rows, passes: Sequence[Pass], rehearsal: Rehearsal) -> Held:
    training = recipe.training
    terms = [one for one in passes if one.trained]
    sized = [
        (
            term.losses,
            rows.longest(term.share, term.rows * training.per_device_train_batch_size, training.attack_positions),
        )
        for term in terms
    ]
    depth = max((term.layers or shape.depth) for term in terms)
    return rehearsal.outer(depth, sized)


def _dequantised(recipe: Recipe, shape: Shape) -> float:
    """The largest matrix in the precision it is multiplied in, which quantised weights need for a moment."""
    if not (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        return 0.0
    half = recipe.training.bf16 or recipe.training.fp16 or recipe.model.dtype in ("bfloat16", "float16")
    return float(shape.largest * (2 if half else 4))


def modes_of(recipe: Recipe, on_card: bool) -> Modes:
    """
    How a recipe computes.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        on_card (`bool`):
            Whether it is to run on a card, even if it has `use_cpu`.

    Returns:
        [`Modes`].
    """
    training = recipe.training
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    # What the recipe says, not `training.use_cpu`, which the loader sets on a machine without a card.
    on_cpu = bool(recipe.given.get("use_cpu")) and not on_card
    return Modes(autocast, bool(training.activation_checkpointing), on_cpu)
