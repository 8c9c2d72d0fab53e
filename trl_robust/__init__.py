"""Train and test language models that stay aligned under pressure, on top of TRL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._compat import check_versions

__version__ = "0.1.0"

check_versions()

# Looked up on first use: the trainers import TRL, which takes seconds; the threat model and the search do not.
_WHERE = {
    "ThreatModel": "threat",
    "find_paraphrase": "inner",
    "find_perturbation": "inner",
    "LAPDPOConfig": "trainers",
    "LAPDPOTrainer": "trainers",
    "LAPSFTConfig": "trainers",
    "LAPSFTTrainer": "trainers",
    "LATDPOConfig": "trainers",
    "LATDPOTrainer": "trainers",
    "LATRMUConfig": "trainers",
    "LATRMUTrainer": "trainers",
    "LATSFTConfig": "trainers",
    "LATSFTTrainer": "trainers",
    "SEALConfig": "trainers",
    "SEALTrainer": "trainers",
    "Selector": "selection",
}

__all__ = [
    "LAPDPOConfig",
    "LAPDPOTrainer",
    "LAPSFTConfig",
    "LAPSFTTrainer",
    "LATDPOConfig",
    "LATDPOTrainer",
    "LATRMUConfig",
    "LATRMUTrainer",
    "LATSFTConfig",
    "LATSFTTrainer",
    "SEALConfig",
    "SEALTrainer",
    "Selector",
    "ThreatModel",
    "__version__",
    "find_paraphrase",
    "find_perturbation",
]

if TYPE_CHECKING:
    from .inner import find_paraphrase, find_perturbation
    from .selection import Selector
    from .threat import ThreatModel
    from .trainers import (
        LAPDPOConfig,
        LAPDPOTrainer,
        LAPSFTConfig,
        LAPSFTTrainer,
        LATDPOConfig,
        LATDPOTrainer,
        LATRMUConfig,
        LATRMUTrainer,
        LATSFTConfig,
        LATSFTTrainer,
        SEALConfig,
        SEALTrainer,
    )


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
