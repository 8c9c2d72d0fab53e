"""How the worst point is found."""

from .injection import CachedPrefix, Perturbation, attack_mode
from .norms import median_norms
from .pgd import NonBindingRadiusWarning, find_perturbation

__all__ = [
    "CachedPrefix",
    "NonBindingRadiusWarning",
    "Perturbation",
    "attack_mode",
    "find_perturbation",
    "median_norms",
]
