"""Judges, measures, and the running of attacks."""

from ..attacks.endpoint import Endpoint
from .coherence import coherence, perplexity
from .consistency import answer_agreement, posix, prompt_sensitivity
from .curves import envelope, intact
from .judging import agreement
from .load import latent_load
from .metrics import AttackSuccess, attack_success, paired_difference
from .prompt_metrics import PromptRobustness, WinRate
from .proxy import conservative_rate, leave_one_attack_out, proxy_correlation, proxy_study
from .rankings import kendalls_w, ranking_agreement
from .resistance import area_between, factor_of_safety, measured_resistance, resistance, resistance_interval
from .response_judges import ClassifierJudge, RubricJudge
from .robustness import paired_robustness, prompt_robustness, same_prompt_null, win_rate
from .suite import judged, over_refusal, run_attack, utility, write_results

__all__ = [
    "AttackSuccess",
    "ClassifierJudge",
    "Endpoint",
    "PromptRobustness",
    "RubricJudge",
    "WinRate",
    "agreement",
    "answer_agreement",
    "area_between",
    "attack_success",
    "coherence",
    "conservative_rate",
    "envelope",
    "factor_of_safety",
    "intact",
    "judged",
    "kendalls_w",
    "latent_load",
    "leave_one_attack_out",
    "measured_resistance",
    "over_refusal",
    "paired_difference",
    "paired_robustness",
    "perplexity",
    "posix",
    "prompt_robustness",
    "prompt_sensitivity",
    "proxy_correlation",
    "proxy_study",
    "ranking_agreement",
    "resistance",
    "resistance_interval",
    "run_attack",
    "same_prompt_null",
    "utility",
    "win_rate",
    "write_results",
]
