"""Which settings of latent adversarial paraphrasing never come into effect; see `same.py`."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ..inner import preset_settings
from ..inner.lagrangian_settings import LagrangianSettings
from ..threat.sites import resolve_sites

if TYPE_CHECKING:
    from .same import Effect

KNOBS = tuple(f"lap_{item.name}" for item in fields(LagrangianSettings))
CONSTRAINT = ("lap_epsilon", "lap_preset", "lap_lambda_persist", "lap_max_nonfinite", "lap_curves")
COST = ("lap_layers", "lap_steps", "lap_branch", "lap_adv_prob")
"""What decides how many updates the control for cost makes."""
BOUNDS = ("lambda_min", "lambda_max", "skip_first_update")


def drop_unread_of_paraphrases(training: Any, found: Effect, num_layers: int | None) -> None:
    """
    Takes out what nothing reads, and brings the rest into one form: layers, and the search's settings one by one.

    Args:
        training ([`~trl_robust.trainers.lap_arguments.ParaphraseArguments`]):
            Settings of a cell.
        found ([`Effect`]):
            What comes into effect; changed.
        num_layers (`int`, *optional*):
            Of the model, if it is known.
    """
    settings = found.settings
    if not training.attacks:
        cost = _longer(training, num_layers, paired=settings["verb"] == "lap-dpo")
        kept = COST if cost is None else ()
        dropped = [name for name in settings if name.startswith("lap_") and name not in kept]
        found.drop(dropped, f"nothing is perturbed: {_why_nothing(training)}")
        if cost is None:
            settings["lap_match_compute"] = True
        elif cost != 1.0:
            settings["lap_match_compute"] = f"{cost:.12g} times as long"
        return
    if num_layers is not None:
        sites = resolve_sites(training.lap_layers, num_layers)
        settings["lap_layers"] = list(sites)
        reason = f"the layers are {', '.join(map(str, sites))} of {num_layers}"
        found.reasons.append((["lap_layers"], reason))
    if training.lap_branch == "mix" and training.lap_adv_prob == 1:
        settings["lap_branch"] = "adv_only"
        found.reasons.append((["lap_branch", "lap_adv_prob"], "every update is made under perturbation"))
    if settings["lap_branch"] != "mix":
        found.drop(["lap_adv_prob"], "no branch is drawn")
    if training.lap_search == "untargeted":
        found.drop([*CONSTRAINT, *KNOBS], "untargeted LAT has a ball, and no constraint")
        return
    found.drop(["lap_radius"], "only untargeted LAT has a ball")
    _write_out(training, found)


def _why_nothing(training: Any) -> str:
    if training.lap_match_compute:
        return "it is the control for cost"
    if training.lap_branch == "sft_only":
        return "the branch is sft_only"
    return "the search has no steps" if not training.lap_steps else "no update is drawn to be perturbed"


def _longer(training: Any, num_layers: int | None, *, paired: bool) -> float | None:
    """How many times as long the control for cost trains; `None` where that hangs on a depth that is not known."""
    if not training.lap_match_compute:
        return 1.0
    if num_layers is None:
        return None
    return training.cost_ratio(num_layers, reference=int(paired))  # pairs have a reference, which runs as well


def _write_out(training: Any, found: Effect) -> None:
    """The search's settings as they are, whether the preset gives them or a key, without those that nothing reads."""
    search = preset_settings(training.lap_preset, training.overrides)
    own = {
        f"lap_{name}": float(value) if type(value) is int else value  # 2 and 2.0 are one value
        for name, value in asdict(search).items()
    }
    found.settings.update(own)
    del found.settings["lap_preset"]
    found.reasons.append((["lap_preset", *own], "they give the search the same settings"))
    if search.lambda_init == 0 and training.lap_lambda_persist == "none":
        fixed = ("alpha", "violation", "max_log_step", *BOUNDS)
        found.drop([f"lap_{name}" for name in fixed], "a multiplier of 0 stays 0")
    elif search.alpha == 0:
        found.drop(["lap_violation", "lap_max_log_step"], "with an alpha of 0 the multiplier is fixed")
        if _inside(search) and training.lap_lambda_persist == "none":
            found.drop([f"lap_{name}" for name in BOUNDS], "with an alpha of 0 the multiplier is fixed")


def _inside(search: LagrangianSettings) -> bool:
    """Whether the fixed multiplier lies inside its bounds, not on their edge, so that no rounding moves it."""
    return search.lambda_min * (1 + 1e-6) < search.lambda_init < search.lambda_max / (1 + 1e-6) or (
        search.lambda_min == 0 and search.lambda_max == math.inf
    )
