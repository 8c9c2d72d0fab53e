"""Which datasets a verb takes, and which it needs."""

from __future__ import annotations

from pathlib import Path

from ..trainers.lap_arguments import ParaphraseArguments
from .arguments import Recipe
from .ranges import block_of
from .rows import named


def check_shares(recipe: Recipe) -> list[str]:
    """
    Datasets that a verb does not take, and settings whose dataset is missing.

    Args:
        recipe ([`Recipe`]):
            Settings; `recipe.notes` is added to.

    Returns:
        `list[str]`: one entry for each fault.
    """
    training = recipe.training
    has_benign = bool(named(recipe, "benign"))
    if recipe.verb == "seal":
        return _check_seal(recipe)
    faults = [
        f"`{key}` belongs to seal, which chooses rows by it. Remove it, or run `trl-robust seal` first and train on "
        "the rows that it keeps."
        for key, _ in named(recipe, "safe")[:1]
    ]
    if is_lap(recipe):
        return faults + [
            f"{recipe.verb} takes no {share} dataset: it has no term for one. Remove `{key}`, or mix its rows into "
            "the training data with `datasets`."
            for share in ("benign", "retain")
            for key, _ in named(recipe, share)[:1]
        ]
    if recipe.verb == "lat-rmu":
        if has_benign:
            faults.append(
                "lat-rmu takes no benign dataset: what is to stay as it is stands in `retain_dataset_name`. Rename it."
            )
        return faults
    if recipe.verb == "lat-dpo" and named(recipe, "retain"):
        faults.append("`retain_dataset_name` belongs to lat-sft and lat-rmu. Remove it.")
    if training.kl_coef and not has_benign:
        faults.append(
            f"`kl_coef` is {training.kl_coef}: it weighs a divergence on benign data, and no benign dataset is given. "
            "Give `benign_dataset_name`, or set `kl_coef: 0`."
        )
    ablates = training.attacks and training.attack_objective == "refusal_direction"
    if ablates and not has_benign:
        faults.append(
            "`attack_objective: refusal_direction` tells harmful prompts from harmless ones, and no benign dataset is "
            "given. Give `benign_dataset_name`."
        )
    if has_benign and not training.sft_coef and not training.kl_coef and not ablates:
        recipe.notes.append("The benign dataset has no effect: `sft_coef` and `kl_coef` are both 0.")
    return faults


def _check_seal(recipe: Recipe) -> list[str]:
    """Datasets that seal does not take, the one it needs, and the adapters of Algorithm 1."""
    training = recipe.training
    faults = [
        f"seal takes no {share} dataset: it has no term for one. Remove `{key}`, or name it as `safe_dataset_name`."
        for share in ("benign", "retain")
        for key, _ in named(recipe, share)[:1]
    ]
    looks_at_safe = training.attacks and training.selection_method not in ("none", "random")
    if looks_at_safe and not named(recipe, "safe"):
        faults.append(
            "`safe_dataset_name` is missing: rows are judged by what they do to the loss on it. Give a file, a folder "
            "or a hub id."
        )
    if not training.attacks and named(recipe, "safe"):
        recipe.notes.append("The safe dataset has no effect: with `selector_learning_rate: 0` nothing is learned.")
    path = Path(str(recipe.model.model_name_or_path)).expanduser()
    if training.attacks and training.uses_auxiliary and not recipe.model.use_peft and not is_adapter(path):
        faults.append(
            "Algorithm 1 keeps its two models as two adapters on one base. Set `use_peft: true`, or "
            "`penalty_algorithm: memory_efficient`."
        )
    if recipe.model.use_peft and training.attacks and recipe.model.lora_dropout and "lora_dropout" not in recipe.given:
        recipe.notes.append(
            f"`lora_dropout` is TRL's default of {recipe.model.lora_dropout}: the losses that rows are ranked by are "
            "then noisier. `lora_dropout: 0` is the usual choice here."
        )
    return faults


def unvisited(recipe: Recipe, rows: int) -> list[str]:
    """
    Whether a selector's training would end before it has seen every row.

    Args:
        recipe ([`Recipe`]):
            Settings, for the verb `seal`.
        rows (`int`):
            Rows to choose from.

    Returns:
        `list[str]`: one fault, or none.
    """
    training, seen = recipe.training, recipe.training.max_steps * block_of(recipe)
    if training.selection_method != "seal" or not training.attacks or training.max_steps <= 0 or seen >= rows:
        return []
    return [
        f"`max_steps` is {training.max_steps}, which sees {seen} of the {rows} rows; the others could not be ranked. "
        "Remove it (an epoch sees every row), or raise it."
    ]


def is_lap(recipe: Recipe) -> bool:
    """
    Whether a recipe is for latent adversarial paraphrasing.

    Args:
        recipe ([`Recipe`]):
            Settings.

    Returns:
        `bool`.
    """
    return isinstance(recipe.training, ParaphraseArguments)


def is_adapter(folder: Path) -> bool:
    """
    Whether a folder holds an adapter, to be trained further, rather than a model.

    Args:
        folder (`Path`):
            Value of `model_name_or_path`.

    Returns:
        `bool`.
    """
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
