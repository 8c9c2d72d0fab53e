from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from .lap_arguments import ParaphraseArguments


@dataclass
class LAPSFTConfig(ParaphraseArguments, SFTConfig):
    r"""
    Configuration class for the [`LAPSFTTrainer`].

    The settings of the search are those of [`ParaphraseArguments`], and all that is not named there is
    [`~trl.SFTConfig`]'s.
    """
