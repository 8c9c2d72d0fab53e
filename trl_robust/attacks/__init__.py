"""Attacks: one file and one signature each. An attack's fields are its budget; `run` gives a generation a request."""

from .direct import Direct
from .finetune import Finetune
from .latent import Embedding, Latent
from .prefill import Prefill
from .subject import AttackRow, Generation, Subject
from .template import Template

Attack = Direct | Template | Prefill | Latent | Embedding | Finetune

__all__ = [
    "Attack",
    "AttackRow",
    "Direct",
    "Embedding",
    "Finetune",
    "Generation",
    "Latent",
    "Prefill",
    "Subject",
    "Template",
]
