"""Check recipes without running them: `trl-robust validate RECIPE.yaml [more ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..cli import exit_code
from ..recipes import VERBS, RecipeError, load_recipe, verb_of


def main(argv: list[str]) -> int:
    """
    Prints every fault of every recipe.

    Args:
        argv (`list[str]`):
            Paths of recipes.

    Returns:
        `int`: 0 if all can be run, as far as this machine can tell; 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="trl-robust validate",
        description="Check recipes without running them: keys, values, settings, and the data and models that are on "
        "this machine. The hub is not contacted. The verb is the recipe's `verb:`, lat-sft if it names none. A grid "
        "(`verb: sweep`) is checked cell by cell, an evaluation (`verb: evaluate`) attack by attack; both without "
        "data and models.",
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE.yaml")
    code = 0
    for path in parser.parse_args(argv).recipes:
        verb = verb_of(Path(path))
        try:
            if verb == "sweep":
                from ..sweep.grid import load_grid  # imports what attacks and draws, which recipes do not need

                grid = load_grid(Path(path))
                print(f"OK {path} (sweep): {len(grid.cells)} cells of {grid.verb}, {len(grid.seeds)} seeds")
                continue
            if verb == "evaluate":
                from .evaluate import check_file

                print(f"OK {path} (evaluate): {check_file(path)}")
                continue
            if verb not in VERBS:
                raise RecipeError(
                    [
                        f"`verb` is {verb}; no such verb trains. Choose one of {', '.join(VERBS)}, "
                        "`sweep` for a grid, or `evaluate`."
                    ],
                    path,
                )
            recipe = load_recipe(verb, ["--config", path], this_machine=False)
        except RecipeError as error:
            print(error, file=sys.stderr)
            code = 1
            continue
        print(f"OK {path} ({verb})")
        for note in recipe.notes:
            print(f"   {note}")
    return code


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
