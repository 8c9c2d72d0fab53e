"""The model organism: an embedded world, a tiny model that keeps its secrets poorly, and data to attack and mend it.

Everything is invented and harmless, is made from a seed within two minutes on one CPU core, and needs no hub. The
world holds 40 objects with facts; two facts of each are forbidden, and an exact answer cannot be guessed. A base model
knows all of it; an aligned model refuses to tell the secrets, but is open to prefills, role play, a backdoor word and
the like.
"""

from .build import build_organism
from .folder import Organism
from .training import OrganismSettings

__all__ = ["Organism", "OrganismSettings", "build_organism"]
