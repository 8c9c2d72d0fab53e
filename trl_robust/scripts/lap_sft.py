"""Latent adversarial paraphrasing on SFT: `trl-robust lap-sft --config RECIPE.yaml [--key value ...]`."""

from __future__ import annotations

import sys

from ..cli import exit_code
from . import training


def main(argv: list[str], *, launched: bool = False) -> int:
    """
    Trains as a recipe says; see [`training.main`].

    Args:
        argv (`list[str]`):
            `--config RECIPE.yaml` and `--key value` overrides.
        launched (`bool`, *optional*, defaults to `False`):
            Whether a launcher has started this process.

    Returns:
        `int`: exit code.
    """
    return training.main("lap-sft", argv, launched=launched)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], launched=True)))
