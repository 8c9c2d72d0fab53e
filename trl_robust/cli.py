"""The command line: `trl-robust VERB ...`.

Exit codes: 0 done; 1 the user's input is wrong (one message, no traceback); 2 usage; 130 interrupted. Anything else
that is raised is a fault of the program, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    from .recipes import RecipeError

VERBS = {
    "quickstart": ("quickstart", "train and attack the embedded model, and print the table: no hub, no GPU"),
    "organism": ("organism", "build the embedded model and its data into a folder"),
    "lat-sft": ("lat_sft", "latent adversarial training on SFT"),
    "lat-dpo": ("lat_dpo", "latent adversarial training on DPO"),
    "lat-rmu": ("lat_rmu", "unlearning by representation misdirection (RMU), under latent attack"),
    "lap-sft": ("lap_sft", "latent adversarial paraphrasing on SFT"),
    "lap-dpo": ("lap_dpo", "latent adversarial paraphrasing inside DPO (the joint form is ours)"),
    "seal": ("seal", "learn which rows of a dataset hurt, by bilevel data selection"),
    "select": ("select", "apply a saved selector to a dataset and write the rows it keeps"),
    "attack": ("attack", "one attack on one model"),
    "evaluate": ("evaluate", "a suite of measures on one or more models"),
    "report": ("report", "make the report of finished runs or evaluations again, side by side"),
    "diagnose-distance": ("diagnose_distance", "how far apart wordings are inside a model, and what that costs"),
    "sweep": ("sweep", "a grid of runs, measured and compared"),
    "estimate": ("estimate", "memory and time of a recipe before anything is loaded"),
    "validate": ("validate", "check recipes without running them"),
}
"""Verb -> module in `trl_robust.scripts`, and what it does. Modules are imported when their verb is used."""


def main(argv: list[str] | None = None) -> int:
    """
    The console script.

    Args:
        argv (`list[str]`, *optional*):
            Words after the program's name; those of the process if not given.

    Returns:
        `int`: exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"trl-robust {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        suggestion = f"; did you mean `{near[0]}`?" if near else "."
        print(f"trl-robust: `{verb}` is not a verb{suggestion}\n\n{_usage()}", file=sys.stderr)
        return 2
    return exit_code(lambda: importlib.import_module(f".scripts.{VERBS[verb][0]}", __package__).main(rest))


def exit_code(run: Callable[[], int]) -> int:
    """
    Runs a verb and turns what the user can mend into a message and an exit code.

    Args:
        run (`Callable`):
            The verb.

    Returns:
        `int`: exit code.
    """
    # Every import of PEFT would begin with a hint that a faster 4-bit kernel could be installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 itself still sets the old name, so every run would warn of what the user did not write.
    warnings.filterwarnings("ignore", r".*(gradient_checkpointing|is_activation_checkpointing).*", FutureWarning)
    try:
        return run()
    except SystemExit as stop:  # argparse, after its own message
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        _say(str(stop) or "Interrupted.")
        return 130
    except ValueError as error:
        # Asked for by name, because both rooms import TRL, which takes seconds and which not every verb needs.
        if not {"DataError", "RecipeError"} & {kind.__name__ for kind in type(error).__mro__}:
            raise
        if os.environ.get("TRL_ROBUST_TRACEBACK") == "1":
            traceback.print_exc()
        _say(str(error))
        return 1


def _say(message: str) -> None:
    # Of several processes on a machine, one speaks.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)


def fault_of(error: Exception, source: str) -> RecipeError:
    """
    What the construction of a trainer refused, as a fault of the recipe.

    Args:
        error (`Exception`):
            What was raised.
        source (`str`):
            What messages call the recipe.

    Returns:
        [`~trl_robust.recipes.RecipeError`].

    Raises:
        `error` itself, if it was raised in other code than that which checks settings and finds models: it is then a
        fault of the program.
    """
    from .data.errors import DataError
    from .recipes import RecipeError

    if isinstance(error, DataError):
        raise error
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    checks = ("trl_robust", "trl", "transformers", "peft", "huggingface_hub", "accelerate")
    if frames[-1].partition(".")[0] not in checks:
        raise error
    return RecipeError([line for line in str(error).splitlines() if line.strip()], source)


def shows_help(argv: list[str]) -> bool:
    """
    Whether a verb is asked for its help.

    Args:
        argv (`list[str]`):
            Words after the verb.

    Returns:
        `bool`.
    """
    return "-h" in argv or "--help" in argv


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {does}" for verb, (_, does) in VERBS.items())
    return (
        "usage: trl-robust VERB [options]\n\nTrain and test language models that stay aligned under pressure.\n\n"
        f"verbs:\n{verbs}\n\n`trl-robust VERB --help` explains one. `trl-robust --version` prints the version."
    )
