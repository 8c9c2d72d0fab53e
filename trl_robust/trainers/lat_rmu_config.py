from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from trl import SFTConfig

from ..threat.positions import Positions
from ..threat.sites import parse_site
from .lat_arguments import AttackArguments, at_least_zero


@dataclass
class LATRMUConfig(AttackArguments, SFTConfig):
    r"""
    Configuration class for the [`LATRMUTrainer`].

    The attack's settings are those of [`AttackArguments`], with other defaults where named here; the rest is
    [`~trl.SFTConfig`]'s. Defaults are those of the public notebook for Zephyr-7B (lat.md section 5), layers as
    fractions of its depth.

    Parameters:
        attack_sites (`list[str]`, *optional*, defaults to `["0.22"]`):
            Layer 7 of 32.
        attack_positions (`str`, *optional*, defaults to `"all"`):
            Corpora have no prompts.
        attack_radius (`float`, *optional*, defaults to `2.0`):
            Radius at every site.
        attack_away_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the away term on the retain text.
        rmu_layer (`str`, *optional*, defaults to `"0.25"`):
            Layer after which hidden states are steered and kept: 8 of 32.
        rmu_steering_coef (`float`, *optional*, defaults to `6.5`):
            Length of the vector that the hidden states of forget rows are steered to.
        rmu_retain_coef (`float`, *optional*, defaults to `1200.0`):
            Weight of the term that keeps the hidden states of retain rows.
        trained_layers (`list[str]`, *optional*):
            Defaults to `rmu_layer` and the two layers below it. Layers above `rmu_layer` have no gradient.
        trained_modules (`list[str]`, *optional*, defaults to `["down_proj"]`):
            The published choice. `[]` trains all of these layers. With adapters it has no effect.
    """

    attack_sites: list[str] = field(
        default_factory=lambda: ["0.22"],
        metadata={"help": "Where: embedding, layer indices (8, -1), or fractions of the depth (0.5)."},
    )
    attack_positions: Positions = field(
        default="all",
        metadata={
            "help": "Which tokens are perturbed.",
            "choices": list(get_args(Positions)),
        },
    )
    attack_radius: float = field(default=2.0, metadata={"help": "Radius of the ball. 0 turns the attack off."})
    attack_away_coef: float = field(
        default=1.0, metadata={"help": "Weight of -log(1 - p) of the retain text in a targeted attack."}
    )
    rmu_layer: str = field(default="0.25", metadata={"help": "Layer after which hidden states are steered and kept."})
    rmu_steering_coef: float = field(
        default=6.5, metadata={"help": "Length of the vector that forget rows are steered to."}
    )
    rmu_retain_coef: float = field(
        default=1200.0, metadata={"help": "Weight of the term that keeps the hidden states of retain rows."}
    )
    trained_modules: list[str] = field(
        default_factory=lambda: ["down_proj"],
        metadata={"help": "Modules that are trained, by the end of their names; all if empty."},
    )

    @property
    def site_keys(self) -> dict[str, list[str]]:
        return super().site_keys | {"rmu_layer": [self.rmu_layer]}

    @property
    def needs_rejected(self) -> bool:
        return True  # the forget text stands in their place, attacked or not

    def weights(self, benign: bool = False) -> dict[str, float]:
        """
        Weights of the terms of the loss.

        Args:
            benign (`bool`, *optional*, defaults to `False`):
                Not used: the retain rows are what keeps the model.

        Returns:
            `dict`: `steering` and `retain`.
        """
        return {"steering": 1.0, "retain": self.rmu_retain_coef}

    def faults(self) -> list[str]:
        problems = super().faults()
        for name in ("rmu_steering_coef", "rmu_retain_coef"):
            problems += at_least_zero(self, name)
        try:
            if parse_site(self.rmu_layer) == "embedding":
                problems.append("`rmu_layer` names a decoder layer; `embedding` is none.")
        except ValueError as error:
            problems.append(f"rmu_layer: {error}")
        return problems
