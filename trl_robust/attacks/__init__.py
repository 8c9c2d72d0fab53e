"""Attacks: one file and one signature each. An attack's fields are its budget; `run` gives a generation a request."""

from .best_of_n import BestOfN
from .direct import Direct
from .direction import RefusalDirection
from .finetune import Finetune
from .finetune_grid import grid_attacks
from .gcg import GCG
from .latent import Embedding, Latent
from .many_shot import ManyShot
from .pair import PAIR, EndpointAttacker, LocalAttacker
from .prefill import Prefill
from .pruning import Pruning
from .served import Served
from .soft_suffix import SoftSuffix
from .subject import AttackRow, Generation, Subject
from .template import Template
from .universal import Universal

Attack = (
    Direct
    | Template
    | Prefill
    | ManyShot
    | BestOfN
    | GCG
    | PAIR
    | SoftSuffix
    | Embedding
    | Latent
    | Universal
    | RefusalDirection
    | Pruning
    | Finetune
)

__all__ = [
    "GCG",
    "PAIR",
    "Attack",
    "AttackRow",
    "BestOfN",
    "Direct",
    "Embedding",
    "EndpointAttacker",
    "Finetune",
    "Generation",
    "Latent",
    "LocalAttacker",
    "ManyShot",
    "Prefill",
    "Pruning",
    "RefusalDirection",
    "Served",
    "SoftSuffix",
    "Subject",
    "Template",
    "Universal",
    "grid_attacks",
]
