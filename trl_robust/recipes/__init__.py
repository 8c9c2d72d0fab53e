"""Recipes: one YAML file and a command line become checked settings, or one message with everything that is wrong.

- Every key is a field of TRL's or our dataclasses, or an option of `accelerate launch`; anything else is refused with
  the nearest name.
- The command line beats the file.
- Faults are collected, not raised one by one: of the file, of the values, of the settings, of the data and the model.
"""

from .arguments import VERBS, BenignArguments, Recipe, RecipeError
from .checking import check_recipe
from .loading import load_recipe, verb_of
from .resolved import recipe_text, recipes_folder, resolved_recipe

__all__ = [
    "VERBS",
    "BenignArguments",
    "Recipe",
    "RecipeError",
    "check_recipe",
    "load_recipe",
    "recipe_text",
    "recipes_folder",
    "resolved_recipe",
    "verb_of",
]
