"""What a recipe is estimated to cost, as the verb does it."""

from recipe_parts import settings

from trl_robust.estimate import blueprint_of, estimate, find_config, find_rows
from trl_robust.recipes import load_recipe
from trl_robust.scripts.estimate import peft_config_of


def recipe_values(workplace, verb, **changes):
    """A recipe of two updates for any verb."""
    values = settings(workplace, attn_implementation="eager", **changes) | {"verb": verb}
    if verb != "lat-sft":
        del values["away_coef"]
    if verb == "lat-rmu":
        del values["benign_dataset_name"]
        values |= {"dataset_name": str(workplace / "corpus.jsonl"), "attack_positions": "all"}
    return {key: value for key, value in values.items() if value is not None}


def estimated(verb, path, *, on_card=False, lengths=(None, None), model_config=None):
    recipe = load_recipe(verb, ["--config", path], this_machine=False)
    config, _ = find_config(recipe, model_config)
    blueprint = blueprint_of(recipe, config, peft_config_of(recipe))
    return estimate(recipe, blueprint, find_rows(recipe, *lengths), on_card=on_card)
