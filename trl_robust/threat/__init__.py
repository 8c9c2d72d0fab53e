"""What an adversary may do: sites x positions x ball. Pure torch; knows no trainer."""

from .balls import boundary_fraction, project, random_point, steepest, vector_norms
from .model import ThreatModel
from .positions import ranks, selected_ranks, selected_tokens
from .sites import UnsupportedModelError, decoder_layers, resolve_sites

__all__ = [
    "ThreatModel",
    "UnsupportedModelError",
    "boundary_fraction",
    "decoder_layers",
    "project",
    "random_point",
    "ranks",
    "resolve_sites",
    "selected_ranks",
    "selected_tokens",
    "steepest",
    "vector_norms",
]
