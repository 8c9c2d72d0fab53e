"""A grid of runs and its table: `trl-robust sweep --config GRID.yaml [--jobs N] [--dry_run]`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from ..cli import exit_code

DESCRIPTION = """\
Expands a grid (recipes/ablations/ has some) into runs, says which of its cells cannot differ, runs what is missing,
measures every model, and writes a table with paired differences to a baseline and a Pareto picture. Started again, it
goes on where it stopped: no finished run is repeated. docs/sweep.md explains grids."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-robust sweep", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="GRID.yaml", help="the grid")
    parser.add_argument("--output_dir", help="folder for everything, instead of the grid's")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds, instead of the grid's")
    parser.add_argument("--jobs", type=int, help="processes (default: one a GPU, or one a core without a GPU)")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be run, and what cannot differ")
    return parser


def main(argv: list[str]) -> int:
    """
    Runs a sweep.

    Args:
        argv (`list[str]`):
            Words after the verb.

    Returns:
        `int`: 0; 1 if a run failed.
    """
    args = make_parser().parse_args(argv)
    # Here, so that --help is quick.
    from ..recipes import RecipeError
    from ..sweep.grid import load_grid
    from ..sweep.planning import make_plan
    from ..sweep.running import describe, run_sweep

    if args.jobs is not None and args.jobs < 1:
        raise RecipeError([f"`jobs` is {args.jobs}; it must be at least 1."])
    grid = load_grid(args.config, output_dir=args.output_dir, seeds=args.seeds)
    if args.dry_run:
        print("\n".join(describe(grid, make_plan(grid))))
        return 0
    # A batch system says SIGTERM where a person says Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    return 1 if run_sweep(grid, jobs=args.jobs)["failed"] else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
