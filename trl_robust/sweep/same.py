"""Which cells cannot differ, said before anything runs.

Two cells give the same model, bit for bit, when they differ only in settings that never come into effect: sites that
are the same layers of this model, the ball of a search that never reaches its boundary, keys that an objective or an
optimiser does not read. Only what is certain is claimed: cells that merely come close are run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..recipes import Recipe
from ..recipes.arguments import PARTS
from ..recipes.shares import is_lap
from ..threat.sites import resolve_sites
from .same_paraphrases import drop_unread_of_paraphrases
from .same_selections import drop_unread_of_selections
from .stages import SELECTS

BETAS = (0.9, 0.999)
"""Of the AdamW that searches perturbations: torch's own."""
ROUNDING = 1e-3
"""A radius binds nowhere if the search's reach is shorter by at least this share."""

SEARCH = ("steps", "learning_rate", "optimizer", "init", "toward_coef", "away_coef")
BALL = ("norm", "radius", "radius_unit", "ball")
REFUSAL_DIRECTION = ("refusal_direction_every", "refusal_direction_prob")
BENIGN = ("benign_dataset_name", "benign_dataset_config", "benign_dataset_split", "benign_datasets")


@dataclass(frozen=True)
class Shape:
    """
    What of a model decides where a perturbation acts and how far it gets.

    Args:
        num_layers (`int`):
            Decoder layers.
        hidden_size (`int`):
            Length of a hidden state.
    """

    num_layers: int
    hidden_size: int


@dataclass
class Effect:
    """
    The settings of a cell that come into effect.

    Args:
        settings (`dict`):
            All settings, without those that have no effect, and sites as layers.
        reasons (`list[tuple]`):
            Names of settings that have none, or another form, and why.
    """

    settings: dict[str, Any]
    reasons: list[tuple[list[str], str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The same for two cells that cannot differ."""
        return json.dumps(self.settings, sort_keys=True, default=str)

    def drop(self, names: Iterable[str], reason: str) -> None:
        """Takes settings out that have no effect, and notes why, if there are any."""
        there = [name for name in names if name in self.settings]
        for name in there:
            del self.settings[name]
        if there:
            self.reasons.append((there, reason))


def effect_of(recipe: Recipe, shape: Shape | None) -> Effect:
    """
    What of a recipe comes into effect.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            A cell's settings.
        shape ([`Shape`], *optional*):
            The model's, if it is known; sites and reach are else compared as they are written.

    Returns:
        [`Effect`].
    """
    found = Effect(all_settings(recipe))
    training = recipe.training
    if is_lap(recipe):
        drop_unread_of_paraphrases(training, found, shape.num_layers if shape is not None else None)
        return found
    if recipe.verb == SELECTS:
        drop_unread_of_selections(training, found)
        return found
    _drop_unread(recipe, found)
    if not training.attacks:
        names = [name for name in found.settings if name.startswith(("attack_", "refusal_direction_"))]
        found.drop(names, f"nothing is perturbed: {_why_no_attack(training)}")
        return found
    if shape is not None:
        sites = resolve_sites(training.attack_sites, shape.num_layers)
        found.settings["attack_sites"] = list(sites)
        reason = f"the sites are {', '.join(map(str, sites))} of {shape.num_layers} layers"
        found.reasons.append((["attack_sites"], reason))
        if sites == ("embedding",):
            found.drop(["attack_stream"], "at the embedding there is one stream")
        if (unbound := _never_binds(training, shape)) is not None:
            found.drop([f"attack_{name}" for name in BALL], unbound)
    return found


def all_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe, those at their defaults as well."""
    values: dict[str, Any] = {"verb": recipe.verb}
    for name, part in PARTS.items():
        own = getattr(recipe, name)
        for item in dataclasses.fields(part(recipe.verb)):
            if item.init and hasattr(own, item.name):
                value = getattr(own, item.name)
                values[item.name] = value.value if isinstance(value, Enum) else value
    return values


def why_same(cells: tuple[Recipe, Recipe], effects: tuple[Effect, Effect]) -> str:
    """
    Why two cells cannot differ.

    Args:
        cells (`tuple` of two [`~trl_robust.recipes.Recipe`]):
            Their settings.
        effects (`tuple` of two [`Effect`]):
            What of them comes into effect.

    Returns:
        `str`: the reasons that concern what is written differently.
    """
    first, second = (all_settings(recipe) for recipe in cells)
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    reasons = [text for effect in effects for names, text in effect.reasons if differing & set(names)]
    return "; ".join(dict.fromkeys(reasons)) or "they have the same settings"


def _why_no_attack(training: Any) -> str:
    return "the radius is 0" if not training.attack_radius > 0 else "the search has no steps"


def _drop_unread(recipe: Recipe, found: Effect) -> None:
    """Keys that the objective, the optimiser or a coefficient of 0 leaves unread."""
    training, settings = recipe.training, found.settings
    objective = training.attack_objective
    if objective == "random":
        found.drop([f"attack_{name}" for name in SEARCH], "a random perturbation is not searched for")
    elif objective == "refusal_direction":
        found.drop([f"attack_{name}" for name in (*SEARCH, *BALL)], "the refusal direction is not searched for")
    elif training.attack_optimizer == "steepest":
        found.drop(["attack_learning_rate"], "the steepest optimizer has its own step")
    if objective in ("untargeted", "swapped"):
        coefficients = ["attack_toward_coef", "attack_away_coef"]
        found.drop(coefficients, f"the attack's coefficients belong to targeted attacks, and this one is {objective}")
    if objective != "refusal_direction":
        found.drop(REFUSAL_DIRECTION, "no refusal direction is removed")
    if settings.get("attack_site_choice") == "all":
        found.drop(["attack_num_sites"], "all sites are attacked")
    if settings.get("faithful"):
        found.drop(["reset_optimizer"], "a faithful run resets its optimiser in any case")
    if settings.get("kl_coef") == 0:
        found.drop(["kl_form"], "the KL term has no weight")
    if settings.get("away_coef") == 0:
        found.drop(["away_loss", "away_cutoff"], "the away term has no weight")
    if settings.get("toward_coef") == 0:
        found.drop(["toward_cutoff"], "the toward term has no weight")
    if settings.get("sft_coef") == 0 and settings.get("kl_coef") == 0:
        found.drop([*BENIGN, "benign_per_example"], "the benign terms have no weight")
    elif recipe.benign.benign_dataset_name is None and not recipe.benign.benign_datasets:
        found.drop(["sft_coef", "kl_coef", "kl_form", "benign_per_example"], "there is no benign dataset")


def _never_binds(training: Any, shape: Shape) -> str | None:
    """Why the ball does not matter, if the search cannot reach its boundary from zero, whatever the gradients are."""
    searched = training.attack_objective in ("targeted", "untargeted", "swapped")
    by_coordinate = training.attack_optimizer in ("adamw", "sign") and training.attack_init == "zero"
    chosen_by_ball = getattr(training, "attack_site_choice", "all") == "gradient"
    if not (searched and by_coordinate and training.attack_radius_unit == "absolute") or chosen_by_ball:
        return None
    steps, rate = training.attack_steps, training.attack_learning_rate
    per_coordinate = adam_reach(steps, rate) if training.attack_optimizer == "adamw" else steps * rate
    dimension = shape.hidden_size
    if training.attack_ball == "sequence":
        if training.max_length is None:
            return None
        dimension *= training.max_length  # no row has more tokens to perturb
    reach = per_coordinate * {"l1": dimension, "l2": math.sqrt(dimension), "linf": 1.0}[training.attack_norm]
    if reach * (1 + ROUNDING) >= training.attack_radius:
        return None
    return (
        f"the radius never binds: {steps} steps of {training.attack_optimizer} at {rate:g} reach at most {reach:.3g} "
        f"in {training.attack_norm}, below {training.attack_radius:g}"
    )


def adam_reach(steps: int, learning_rate: float) -> float:
    """
    How far a coordinate can get from zero in so many steps of Adam, whatever the gradients are.

    Step t moves it by `learning_rate * m / sqrt(v)`, two weighted means of the gradients so far, and by the inequality
    of Cauchy and Schwarz `m / sqrt(v)` is at most `sqrt(sum(a**2 / b))` for their weights a and b. That is 1 at the
    first step and 1.1 at the 16th; the usual estimate, steps x learning rate, takes it to be 1.

    Args:
        steps (`int`):
            Steps.
        learning_rate (`float`):
            Learning rate.

    Returns:
        `float`.
    """
    first, second = BETAS
    total = 0.0
    for step in range(1, steps + 1):
        squares = 0.0
        for age in range(step):
            a = (1 - first) * first**age / (1 - first**step)
            b = (1 - second) * second**age / (1 - second**step)
            squares += a**2 / b
        total += math.sqrt(squares)
    return learning_rate * total
