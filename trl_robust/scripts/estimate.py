"""Memory and time of a recipe before anything is loaded: `trl-robust estimate --config RECIPE.yaml [--gpu CARD]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peft import PeftConfig
from trl import get_peft_config

from ..cli import exit_code, shows_help
from ..estimate import CARDS, Card, blueprint_of, card_named, describe, estimate, find_config, find_rows
from ..recipes import Recipe, RecipeError, load_recipe, verb_of
from ..recipes.loading import DEFAULT_VERB, fit_word, shown
from ..recipes.reading import split_command_line, without
from ..recipes.shares import is_adapter
from ..recipes.values import UnfitError, fit, nearest

OPTIONS: dict[str, tuple[type, str]] = {
    "gpu": (str, f"the card: {', '.join(card.name for card in CARDS)}"),
    "gpu_memory_gb": (float, "its memory in GiB, in place of that of the card, or for a card we do not know"),
    "prompt_tokens": (int, "tokens of every prompt, in place of what the data say"),
    "completion_tokens": (int, "tokens of every completion"),
    "model_config": (str, "a config.json or its folder, where the model's own cannot be had"),
}
"""Options of this verb; all others are the recipe's."""

VERBS = ("lat-sft", "lat-dpo", "lat-rmu")


def main(argv: list[str]) -> int:
    """
    Prints what a recipe will cost.

    Args:
        argv (`list[str]`):
            `--config RECIPE.yaml`, the options above, and overrides of the recipe.

    Returns:
        `int`: exit code; 0 whether or not the run fits.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: the recipe or an option is wrong.
    """
    if shows_help(argv):
        print(_help())
        return 0
    options, faults = _options(argv)
    words = without(argv, {*OPTIONS, "verb"})
    try:
        recipe = load_recipe(_verb(argv), words, this_machine=False)
    except RecipeError as error:
        if not faults:
            raise
        raise RecipeError(faults + error.faults, error.source) from error
    if faults:
        raise RecipeError(faults, "The command line")
    card = _card(options)
    config, origin = find_config(recipe, options.get("model_config"))
    rows = find_rows(recipe, options.get("prompt_tokens"), options.get("completion_tokens"))
    blueprint = blueprint_of(recipe, config, peft_config_of(recipe))
    on_card = card is not None or not recipe.given.get("use_cpu")
    print(describe(estimate(recipe, blueprint, rows, on_card=on_card), origin, card))
    return 0


def _options(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    given, _ = split_command_line(argv)
    found: dict[str, Any] = {}
    faults = []
    for name, (kind, _) in OPTIONS.items():
        if name not in given:
            continue
        try:
            found[name] = fit(fit_word(given[name], kind), kind)
        except UnfitError as error:
            faults.append(f"`--{name}` is {shown(given[name])}; {error}.")
            continue
        if kind is not str and not 0 < found[name] < float("inf"):
            faults.append(f"`--{name}` is {found[name]}; it must be above 0.")
    if "gpu" in found and card_named(found["gpu"]) is None:
        known = [card.name for card in CARDS]
        hint = nearest(found["gpu"], known) or f". Known cards are {', '.join(known)}; "
        faults.append(
            f"`--gpu` is {found['gpu']}, a card we do not know{hint.rstrip('?; ')}"
            f"{'?' if hint.endswith('?') else '.'} For any other, give its memory with `--gpu_memory_gb`."
        )
    stated = [name for name in ("prompt_tokens", "completion_tokens") if name in given]
    if len(stated) == 1:
        faults.append(f"`--{stated[0]}` is given alone. Give `--prompt_tokens` and `--completion_tokens`, or neither.")
    return found, faults


def _verb(argv: list[str]) -> str:
    given, _ = split_command_line(argv)
    words = {name: given[name].value for name in ("verb", "config") if name in given}
    verb = DEFAULT_VERB
    if len(words.get("verb", [])) == 1:
        verb = words["verb"][0]
    elif len(words.get("config", [])) == 1:
        verb = verb_of(Path(words["config"][0]).expanduser())
    if verb not in VERBS:
        raise RecipeError([f"`verb` is {verb}; only {', '.join(VERBS)} can be estimated."])
    return verb


def _card(options: dict[str, Any]) -> Card | None:
    known = card_named(options["gpu"]) if "gpu" in options else None
    if "gpu_memory_gb" not in options:
        return known
    name = known.name if known is not None else "the card"
    return Card(name, options["gpu_memory_gb"], known.bf16 if known else None, known.fp32 if known else None)


def peft_config_of(recipe: Recipe) -> Any:
    """
    The adapters of a recipe.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.

    Returns:
        [`~peft.PeftConfig`]: those it makes, or those of the adapter that it trains further; `None` without.
    """
    folder = Path(str(recipe.model.model_name_or_path)).expanduser()
    if not is_adapter(folder):
        return get_peft_config(recipe.model)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # as it was saved, nothing of it would be trained
    return config


def _help() -> str:
    width = max(map(len, OPTIONS))
    options = "\n".join(f"  --{name:<{width}}  {text}" for name, (_, text) in OPTIONS.items())
    return (
        "usage: trl-robust estimate --config RECIPE.yaml [options] [--key value ...]\n\n"
        f"Memory, work and time of a recipe ({', '.join(VERBS)}), before anything is loaded.\n\n"
        f"options:\n{options}\n\n"
        "Every key of the recipe can be overridden, as in training. Without `--gpu`, the cards on which the run fits "
        "are listed."
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
