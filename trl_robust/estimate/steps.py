"""The passes of a step of every verb, in the order in which the trainers make them."""

from __future__ import annotations

from typing import Any

from ..threat.sites import resolve_sites
from ..trainers.adversary import CALIBRATION_ROWS, DIRECTION_ROWS
from .passes import Pass, attack_passes


def step_passes(verb: str, training: Any, depth: int, benign: bool) -> list[Pass]:
    """
    What is run for a micro-batch: the attack's passes in every attack, all others in every update.

    Args:
        verb (`str`):
            `lat-sft`, `lat-dpo` or `lat-rmu`.
        training ([`~trl_robust.trainers.lat_arguments.AttackArguments`]):
            Settings.
        depth (`int`):
            Layers of the model.
        benign (`bool`):
            Whether there are benign rows.

    Returns:
        `list` of [`Pass`].
    """
    attack = attack_passes(training, _attack_terms(training), depth)
    if verb == "lat-rmu":
        return attack + _rmu(training, depth)
    own = _dpo(training) if verb == "lat-dpo" else _sft(training)
    return attack + own + (_benign(training) if benign else [])


def _attack_terms(training: Any) -> list[tuple[str, str, int]]:
    objective = training.attack_objective
    if objective == "swapped":
        return [("pair", "toward", 2)]
    if objective == "untargeted":
        return [("chosen", "toward", 1)]
    if objective == "random":
        return [("rejected" if _has_rejected(training) else "chosen", "toward", 1)]
    terms = [("rejected", "toward", 1, training.attack_toward_coef), ("chosen", "away", 1, training.attack_away_coef)]
    return [(share, loss, rows) for share, loss, rows, weight in terms if weight]


def _has_rejected(training: Any) -> bool:
    # A pair of DPO has both completions, whatever is attacked.
    return training.needs_rejected or hasattr(training, "beta")


def _sft(training: Any) -> list[Pass]:
    found = []
    if training.toward_coef:
        kind = "toward" if training.toward_cutoff else "fused"
        found.append(Pass("defence", "chosen", (kind,), trained=1))
    if training.away_coef:
        kind = "away" if training.away_loss == "unlikelihood" else "toward"
        found.append(Pass("defence", "rejected", (kind,), trained=1))
    return found


def _dpo(training: Any) -> list[Pass]:
    found = [Pass("defence", "pair", ("fused",), trained=1, rows=2)]
    if not training.precompute_ref_log_probs:
        found.append(Pass("reference", "pair", ("fused",), whole=1, rows=2))
    return found


def _rmu(training: Any, depth: int) -> list[Pass]:
    layers = rmu_layers(training, depth)
    found = [Pass("defence", "rejected", ("hidden",), trained=1, layers=layers)]
    if training.rmu_retain_coef:
        found.append(Pass("benign", "chosen", ("hidden",), trained=1, layers=layers))
        found.append(Pass("reference", "chosen", ("hidden",), whole=1, layers=layers))
    return found


def rmu_layers(training: Any, depth: int) -> int:
    """
    Layers that a pass of RMU runs.

    Args:
        training ([`~trl_robust.trainers.LATRMUConfig`]):
            Settings.
        depth (`int`):
            Layers of the model.

    Returns:
        `int`.
    """
    return int(resolve_sites([training.rmu_layer], depth)[0]) + 1


def _benign(training: Any) -> list[Pass]:
    kinds = tuple(kind for kind, weight in (("toward", training.sft_coef), ("kl", training.kl_coef)) if weight)
    if not kinds:
        return []
    found = [Pass("benign", "benign", kinds, trained=1, rows=training.benign_per_example)]
    if training.kl_coef:
        found.append(Pass("reference", "benign", ("reference",), whole=1, rows=training.benign_per_example))
    return found


def measuring(training: Any, updates: int | None, rows: int | None) -> list[tuple[Pass, int]]:
    """
    Passes that measure something for the adversary, outside any micro-batch.

    Args:
        training ([`~trl_robust.trainers.lat_arguments.AttackArguments`]):
            Settings.
        updates (`int`, *optional*):
            Updates of the run.
        rows (`int`, *optional*):
            Rows of the training data; enough, if not given.

    Returns:
        `list`: passes, and over how many rows each goes in the whole run, on one process.
    """
    if not training.attacks:
        return []
    if training.attack_objective == "refusal_direction":
        times = -(-(updates or 1) // training.refusal_direction_every)
        if training.faithful and training.gradient_accumulation_steps > 1:
            times = 1  # the first micro-batch, in which it would be measured again, is not attacked
        count = min(DIRECTION_ROWS, rows or DIRECTION_ROWS) * times
        both = (("chosen", 1), ("benign", training.benign_per_example))
        return [(Pass("attack", share, ("toward",), whole=1, rows=each), count) for share, each in both]
    if training.attack_radius_unit == "relative":
        return [(Pass("attack", "chosen", ("toward",), whole=1), min(CALIBRATION_ROWS, rows or CALIBRATION_ROWS))]
    return []
