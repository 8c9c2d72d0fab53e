"""Thin subclasses of TRL's trainers, one file each."""

from .._compat import check_seams

check_seams()

from .lat_sft import LATSFTTrainer  # noqa: E402
from .lat_sft_config import LATSFTConfig  # noqa: E402

__all__ = ["LATSFTConfig", "LATSFTTrainer"]
