"""The datasets that a recipe names."""

from __future__ import annotations

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from trl.scripts.utils import DatasetConfig

from ..data import DataError, add_row_hashes, as_conversation, is_local, load_rows, pair_corpora
from .arguments import Recipe

SHARES = ("train", "evaluation", "benign", "retain", "safe")


def named(recipe: Recipe, share: str) -> list[tuple[str, DatasetConfig]]:
    """
    The datasets that make up a share.

    Args:
        recipe ([`Recipe`]):
            Settings.
        share (`str`):
            One of `SHARES`.

    Returns:
        `list`: the key that names a dataset, and where it is; empty if the recipe names none.
    """
    script, benign = recipe.script, recipe.benign
    if share == "benign":
        if benign.benign_datasets:
            return [("benign_datasets", _config(entry)) for entry in benign.benign_datasets]
        if benign.benign_dataset_name is None:
            return []
        name, config, split = benign.benign_dataset_name, benign.benign_dataset_config, benign.benign_dataset_split
        return [("benign_dataset_name", DatasetConfig(name, config, split=split))]
    if share == "safe":
        if benign.safe_datasets:
            return [("safe_datasets", _config(entry)) for entry in benign.safe_datasets]
        if benign.safe_dataset_name is None:
            return []
        name, config, split = benign.safe_dataset_name, benign.safe_dataset_config, benign.safe_dataset_split
        return [("safe_dataset_name", DatasetConfig(name, config, split=split))]
    if share == "retain":
        if benign.retain_dataset_name is None:
            return []
        name, config, split = benign.retain_dataset_name, benign.retain_dataset_config, benign.retain_dataset_split
        return [("retain_dataset_name", DatasetConfig(name, config, split=split))]
    if share == "evaluation" and not evaluates(recipe):
        return []
    if recipe.mixture.datasets:
        # The rows to evaluate on are then taken out of the mixture.
        return [("datasets", _config(entry)) for entry in recipe.mixture.datasets] if share == "train" else []
    if script.dataset_name is None:
        return []
    split = script.dataset_train_split if share == "train" else script.dataset_test_split
    return [("dataset_name", DatasetConfig(script.dataset_name, script.dataset_config, split=split))]


def _config(entry: DatasetConfig | dict) -> DatasetConfig:
    return DatasetConfig(**entry) if isinstance(entry, dict) else entry


def evaluates(recipe: Recipe) -> bool:
    """
    Whether a recipe asks for evaluation.

    Args:
        recipe ([`Recipe`]):
            Settings.

    Returns:
        `bool`.
    """
    strategy = recipe.training.eval_strategy
    return getattr(strategy, "value", strategy) != "no"


def load_one(source: DatasetConfig) -> Dataset:
    """
    Loads one dataset.

    Args:
        source ([`~trl.scripts.utils.DatasetConfig`]):
            Where it is; its `path` may be a file, a folder or a hub id.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        [`DataError`]: it cannot be loaded, or lacks a column.
    """
    if source.data_files is None and source.data_dir is None:
        rows = load_rows(source.path, config=source.name, split=source.split)
    else:
        options = {"data_dir": source.data_dir, "data_files": source.data_files, "split": source.split}
        try:
            rows = load_dataset(source.path, source.name, **options)
        except (DatasetsError, OSError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"Dataset {source.path} cannot be read: {reason}") from error
    if source.columns is None:
        return rows
    missing = sorted(set(source.columns) - set(rows.column_names))
    if missing:
        raise DataError(f"Dataset {source.path} has no column {missing}; it has {rows.column_names}.")
    return rows.select_columns(source.columns)


def load_named(recipe: Recipe, share: str) -> Dataset | None:
    """
    Loads a share of a recipe's data as it is named: before any row becomes a conversation or is set aside.

    Args:
        recipe ([`Recipe`]):
            Settings.
        share (`str`):
            One of `SHARES`.

    Returns:
        [`~datasets.Dataset`]; `None` if the recipe names none.

    Raises:
        [`DataError`]: it cannot be loaded.
    """
    sources = named(recipe, share)
    return _mixed([(source, load_one(source)) for _, source in sources]) if sources else None


def load_share(recipe: Recipe, share: str) -> Dataset | None:
    """
    Loads a share of a recipe's data, once.

    Args:
        recipe ([`Recipe`]):
            Settings; what is loaded is kept in `recipe.loaded`.
        share (`str`):
            One of `SHARES`.

    Returns:
        [`~datasets.Dataset`], in conversational form if the recipe asks for it; `None` if the recipe names none.

    Raises:
        [`DataError`]: it cannot be loaded.
    """
    if share not in recipe.loaded and (rows := load_named(recipe, share)) is not None:
        if recipe.verb == "seal" and share == "train":
            rows = add_row_hashes(rows)  # of the rows as they are named, before they become conversations
        if recipe.benign.chat_format or recipe.benign.system_prompt is not None:
            _check_system_prompt(recipe, rows)
            rows = as_conversation(rows, recipe.benign.system_prompt, name=share)
        if share == "benign" and rows.column_names == ["text"]:
            rows = _without_empty(recipe, rows)
        if share in ("train", "evaluation") and (retain := load_share(recipe, "retain")) is not None:
            rows = pair_corpora(rows, retain, seed=recipe.training.seed)
        if share == "train" and recipe.mixture.datasets and recipe.mixture.test_split_size is not None:
            parts = rows.train_test_split(test_size=recipe.mixture.test_split_size, seed=recipe.training.seed)
            rows = parts["train"]
            if evaluates(recipe):
                recipe.loaded["evaluation"] = parts["test"]
        recipe.loaded[share] = rows
    return recipe.loaded.get(share)


def _without_empty(recipe: Recipe, rows: Dataset) -> Dataset:
    """A corpus without its empty texts, of which the usual ones have one between paragraphs."""
    kept = [number for number, text in enumerate(rows["text"]) if text is None or text.strip()]
    if len(kept) == len(rows):
        return rows
    recipe.notes.append(f"{len(rows) - len(kept)} empty texts of the benign dataset are left out")
    return rows.select(kept)


def _check_system_prompt(recipe: Recipe, rows: Dataset) -> None:
    """A system prompt alone does not ask for a chat template; whether plain rows get one is not guessed."""
    plain = "prompt" in rows.column_names and any(isinstance(prompt, str) for prompt in rows["prompt"])
    if plain and not recipe.benign.chat_format:
        raise DataError(
            "`system_prompt` is given, and the rows are plain text, which has no system message. Set "
            "`chat_format: true` to make messages of it, or remove `system_prompt`."
        )


def _mixed(parts: list[tuple[DatasetConfig, Dataset]]) -> Dataset:
    """The rows of several datasets; with `fraction`, as many of each as the shares allow without a row twice."""
    shares = [source.fraction for source, _ in parts]
    if any(share is not None for share in shares):
        if any(share is None or not share > 0 for share in shares):
            raise DataError("`fraction` must be above 0 and stand at every dataset of a mixture, or at none.")
        unit = min(len(rows) / share for share, (_, rows) in zip(shares, parts, strict=True) if share)
        parts = [
            (source, rows.select(range(round(share * unit))))
            for share, (source, rows) in zip(shares, parts, strict=True)
            if share
        ]
    if len(parts) == 1:
        return parts[0][1]
    # `datasets` itself fills columns that some lack with nothing.
    if len({frozenset(rows.column_names) for _, rows in parts}) > 1:
        columns = "; ".join(f"{source.path} {rows.column_names}" for source, rows in parts)
        raise DataError(
            f"The datasets of a mixture need the same columns; they have: {columns}. Name those to keep in `columns`."
        )
    try:
        return concatenate_datasets([rows for _, rows in parts])
    except ValueError as error:
        raise DataError(f"The datasets of a mixture do not go together: {' '.join(str(error).split())}") from error


def all_local(recipe: Recipe, share: str) -> bool:
    """
    Whether a share can be loaded without the hub.

    Args:
        recipe ([`Recipe`]):
            Settings.
        share (`str`):
            One of `SHARES`.

    Returns:
        `bool`.
    """
    generic = ("json", "csv", "parquet")  # `path: json` with `data_files`
    return all(is_local(source.path) or source.path in generic for _, source in named(recipe, share))
