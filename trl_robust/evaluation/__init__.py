"""Judges, measures, and the running of attacks."""

from .metrics import AttackSuccess, attack_success, paired_difference
from .suite import judged, over_refusal, run_attack, utility, write_results

__all__ = [
    "AttackSuccess",
    "attack_success",
    "judged",
    "over_refusal",
    "paired_difference",
    "run_attack",
    "utility",
    "write_results",
]
