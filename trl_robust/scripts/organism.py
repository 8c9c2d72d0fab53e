"""Build the embedded world's model and data: `trl-robust organism --output_dir DIR [--seed 0]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..cli import exit_code, fault_of
from ..organism import OrganismSettings, build_organism
from .inputs import folder_fault, seed_fault


def main(argv: list[str]) -> int:
    """
    Builds the organism, or finds it built.

    Args:
        argv (`list[str]`):
            `--output_dir DIR` and, if need be, `--seed N`, `--num_layers N` and `--no_secrets`.

    Returns:
        `int`: exit code.
    """
    parser = argparse.ArgumentParser(
        prog="trl-robust organism",
        description="Build a tiny language model with secrets it keeps poorly, and data to attack and mend it, for "
        "use as any model and dataset. Takes about a minute on one CPU core.",
    )
    parser.add_argument("--output_dir", required=True, help="folder to write to: new, empty, or of the same organism")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and the weights (default 0)")
    parser.add_argument(
        "--num_layers",
        type=int,
        default=2,
        help="blocks of the model (default 2; 8 for comparing layers, takes twice the time)",
    )
    parser.add_argument(
        "--no_secrets",
        action="store_true",
        help="an organism that was never told its secrets, on which every attack must report zero",
    )
    args = parser.parse_args(argv)
    found = (folder_fault(Path(args.output_dir)), seed_fault(args.seed))
    if faults := [fault for fault in found if fault is not None]:
        from ..recipes import RecipeError  # imports TRL, which the organism does not need

        raise RecipeError(faults)
    try:
        settings = OrganismSettings(num_layers=args.num_layers, secrets=not args.no_secrets)
        organism = build_organism(args.output_dir, seed=args.seed, settings=settings)
    except ValueError as error:
        raise fault_of(error, "The command line") from error
    print(f"model  {organism.model}\ndata   {organism.data}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
