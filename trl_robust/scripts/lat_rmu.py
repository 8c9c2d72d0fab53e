"""Unlearning by representation misdirection under latent attack: `trl-robust lat-rmu --config RECIPE.yaml`."""

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
    return training.main("lat-rmu", argv, launched=launched)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:], launched=True)))
