"""How the worst point is found."""

from .directions import refusal_directions
from .injection import Ablation, CachedPrefix, Change, Perturbation, attack_mode
from .norms import median_norms
from .observing import hidden_after
from .pgd import find_perturbation
from .search import NonBindingRadiusWarning

__all__ = [
    "Ablation",
    "CachedPrefix",
    "Change",
    "NonBindingRadiusWarning",
    "Perturbation",
    "attack_mode",
    "find_perturbation",
    "hidden_after",
    "median_norms",
    "refusal_directions",
]
