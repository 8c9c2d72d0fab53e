"""Thin subclasses of TRL's trainers, one file each."""

from .._compat import check_seams

check_seams()

from .lap_arguments import branch_of_p  # noqa: E402
from .lap_dpo import LAPDPOTrainer  # noqa: E402
from .lap_dpo_config import LAPDPOConfig  # noqa: E402
from .lap_sft import LAPSFTTrainer  # noqa: E402
from .lap_sft_config import LAPSFTConfig  # noqa: E402
from .lat_dpo import LATDPOTrainer  # noqa: E402
from .lat_dpo_config import LATDPOConfig  # noqa: E402
from .lat_rmu import LATRMUTrainer  # noqa: E402
from .lat_rmu_config import LATRMUConfig  # noqa: E402
from .lat_sft import LATSFTTrainer  # noqa: E402
from .lat_sft_config import LATSFTConfig  # noqa: E402
from .seal import SEALTrainer  # noqa: E402
from .seal_config import SEALConfig  # noqa: E402

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
    "branch_of_p",
]
