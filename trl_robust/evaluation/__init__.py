"""Judges, measures, and the running of attacks."""

from .consistency import answer_agreement, posix, prompt_sensitivity
from .metrics import AttackSuccess, attack_success, paired_difference
from .prompt_metrics import PromptRobustness, WinRate
from .rankings import kendalls_w, ranking_agreement
from .robustness import paired_robustness, prompt_robustness, same_prompt_null, win_rate
from .suite import judged, over_refusal, run_attack, utility, write_results

__all__ = [
    "AttackSuccess",
    "PromptRobustness",
    "WinRate",
    "answer_agreement",
    "attack_success",
    "judged",
    "kendalls_w",
    "over_refusal",
    "paired_difference",
    "paired_robustness",
    "posix",
    "prompt_robustness",
    "prompt_sensitivity",
    "ranking_agreement",
    "run_attack",
    "same_prompt_null",
    "utility",
    "win_rate",
    "write_results",
]
