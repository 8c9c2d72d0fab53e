"""How the worst point is found."""

from .directions import refusal_directions
from .injection import Ablation, CachedPrefix, Change, Perturbation, attack_mode
from .lagrangian import ConstrainedSearch
from .lagrangian_settings import LagrangianSettings, preset_settings
from .norms import median_norms
from .observing import hidden_after
from .paraphrase import Paraphrase, find_paraphrase, row_noise
from .pgd import find_perturbation
from .search import NonBindingRadiusWarning

__all__ = [
    "Ablation",
    "CachedPrefix",
    "Change",
    "ConstrainedSearch",
    "LagrangianSettings",
    "NonBindingRadiusWarning",
    "Paraphrase",
    "Perturbation",
    "attack_mode",
    "find_paraphrase",
    "find_perturbation",
    "hidden_after",
    "median_norms",
    "preset_settings",
    "refusal_directions",
    "row_noise",
]
