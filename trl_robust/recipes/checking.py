"""What can be found wrong with a recipe without loading weights or asking the hub."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer
from trl import is_conversational

from ..data import (
    DataError,
    as_prompt_completion,
    check_none_lost,
    is_local,
    where_looked,
)
from ..threat.sites import parse_site, resolve_sites
from .arguments import Recipe
from .lengths import fitting_rows
from .ranges import block_of, check_ranges
from .rows import SHARES, all_local, evaluates, load_share, named
from .shares import check_shares, is_adapter, is_lap, unvisited

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""A folder with none of these has no tokenizer."""

PAIRED = ("lat-dpo", "lat-rmu", "lap-dpo")
"""Verbs that train on pairs."""

LENGTHS_CHECKED = 20_000
"""Prompts of a dataset that are tokenised to see whether they fit. Training checks the others."""


def check_recipe(recipe: Recipe, faulty: set[str] | None = None) -> list[str]:
    """
    Looks for faults that show in the data and the model on this machine; hub ids are left alone, with a note.

    Args:
        recipe ([`Recipe`]):
            Settings; `recipe.notes` is added to.
        faulty (`set[str]`, *optional*):
            Keys that have been refused already.

    Returns:
        `list[str]`: one entry for each fault.
    """
    faulty = faulty or set()
    faults = check_ranges(recipe) + _check_combinations(recipe, faulty) + _check_quantization(recipe)
    faults += _check_chat_template(recipe)
    model_faults, tokenizer = _check_model(recipe, faulty)
    faults += model_faults
    for share in SHARES:
        faults += _check_share(recipe, share, tokenizer)
    return faults


def _check_combinations(recipe: Recipe, faulty: set[str]) -> list[str]:
    training, script, mixture, benign = recipe.training, recipe.script, recipe.mixture, recipe.benign
    faults = []
    if script.dataset_name is None and not mixture.datasets and not faulty & {"dataset_name", "datasets"}:
        faults.append("`dataset_name` is missing: give a file, a folder or a hub id (or several in `datasets`).")
    if script.dataset_name is not None and mixture.datasets:
        faults.append("`dataset_name` and `datasets` are both given. Keep one.")
    for share in ("benign", "safe"):
        if getattr(benign, f"{share}_dataset_name") is not None and getattr(benign, f"{share}_datasets"):
            faults.append(f"`{share}_dataset_name` and `{share}_datasets` are both given. Keep one.")
    for name, streams in (("dataset_streaming", script.dataset_streaming), ("streaming", mixture.streaming)):
        if streams:
            faults.append(f"`{name}: true` cannot be: benign rows are joined to the others by number. Remove it.")
    if evaluates(recipe) and mixture.datasets and mixture.test_split_size is None:
        faults.append(
            "`eval_strategy` asks for evaluation, and `datasets` gives no rows for it. Set `test_split_size`, or "
            '`eval_strategy: "no"`.'
        )
    if training.needs_prompt and getattr(training, "completion_only_loss", None) is False:
        positions = "lap_positions" if is_lap(recipe) else "attack_positions"
        faults.append(
            "`completion_only_loss: false` trains on prompts as on completions, so that no token counts as a prompt "
            f"to perturb (`{positions}: {training.positions}`). Remove it, or use `{positions}: all`."
        )
    if getattr(training, "dataset_text_field", "text") != "text":
        faults.append(
            f"`dataset_text_field` is {training.dataset_text_field}; only `text` is read. Rename the column to "
            "`text`, and remove the key."
        )
    return faults + check_shares(recipe)


def _check_quantization(recipe: Recipe) -> list[str]:
    model, faults = recipe.model, []
    if not (model.load_in_4bit or model.load_in_8bit):
        return []
    key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        faults.append(f"`{key}` needs bitsandbytes, which is not installed: pip install 'trl-robust[quantization]'")
    if not model.use_peft and not is_adapter(Path(str(model.model_name_or_path)).expanduser()):
        faults.append(f"`{key}` freezes the weights, so that only an adapter can be trained. Set `use_peft: true`.")
    if "dtype" not in recipe.given:
        recipe.notes.append(f"`{key}` without `dtype` computes in float32. `dtype: bfloat16` is the usual choice.")
    return faults


def _check_model(recipe: Recipe, faulty: set[str]) -> tuple[list[str], Any]:
    """Faults of the model's folder and of the sites in it; and its tokenizer, if it is here."""
    name = recipe.model.model_name_or_path
    if name is None:
        missing = "`model_name_or_path` is missing: give a local folder or a hub id."
        return [] if "model_name_or_path" in faulty else [missing], None
    if not is_local(name):
        recipe.notes.append(f"not checked: `model_name_or_path` {name} is a hub id")
        return [], None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        what = f"{folder} is a file." if folder.exists() else where_looked(name)
        return [f"`model_name_or_path` is {name}: {what} Give the folder of a model, or a hub id."], None
    if is_adapter(folder):
        return _check_adapter(recipe, folder, faulty)
    if not (folder / "config.json").is_file():
        return [f"`model_name_or_path` is {name}: the folder has no config.json, so no model is in it."], None
    return _check_model_files(recipe, folder, folder, faulty)


def has_tokenizer(folder: Path) -> bool:
    """
    Whether a folder holds a tokenizer.

    Args:
        folder (`Path`):
            A model's or an adapter's folder.

    Returns:
        `bool`.
    """
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _check_adapter(recipe: Recipe, folder: Path, faulty: set[str]) -> tuple[list[str], Any]:
    """Faults of an adapter that is to be trained further, and of its base model."""
    if recipe.model.use_peft:
        return [
            f"`model_name_or_path` is {folder}, an adapter, which is trained further as it is; `use_peft: true` would "
            "put a new one beside it. Remove `use_peft` and the `lora_*` keys, or merge the adapter first (PEFT's "
            "`merge_and_unload`) and name the merged model's folder."
        ], None
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        return [f"`model_name_or_path` is {folder}: its adapter_config.json cannot be used: {_line(error)}"], None
    if not is_local(str(base)):
        recipe.notes.append(f"not checked: the base model {base} of the adapter {folder} is a hub id")
        return [], None
    if not (Path(base) / "config.json").is_file():
        return [
            f"`model_name_or_path` is {folder}, an adapter of the model {base}, which is not there. Put it back, or "
            "correct `base_model_name_or_path` in adapter_config.json."
        ], None
    return _check_model_files(recipe, Path(base), folder if has_tokenizer(folder) else Path(base), faulty)


def _check_model_files(recipe: Recipe, folder: Path, tokenizer: Path, faulty: set[str]) -> tuple[list[str], Any]:
    """Faults of a model's configuration, of the sites in it, and of the tokenizer; and the tokenizer."""
    name, trust = recipe.model.model_name_or_path, recipe.training.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        return [f"`model_name_or_path` is {name}: its config.json cannot be used: {_line(error)}"], None
    faults = _check_sites(recipe, config.get_text_config().num_hidden_layers, faulty)
    if not has_tokenizer(tokenizer):
        reason = "the folder has no tokenizer. Save the tokenizer beside the model (`tokenizer.save_pretrained`)."
        return [*faults, f"`model_name_or_path` is {name}: {reason}"], None
    try:
        return faults, AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        reason = f"`model_name_or_path` is {name}: its tokenizer cannot be loaded: {_line(error)}"
        return [*faults, reason], None


def _check_sites(recipe: Recipe, num_layers: int, faulty: set[str]) -> list[str]:
    faults = []
    training = recipe.training
    layers = {key: sites for key, sites in training.site_keys.items() if key not in faulty}
    for key, site in [(key, site) for key, sites in layers.items() for site in sites]:
        try:
            parse_site(site)
        except ValueError:
            continue  # the settings' own checks have said so
        try:
            resolve_sites([site], num_layers)
        except ValueError as error:
            faults.append(f"`{key}`: {error} Correct it, or write a fraction of the depth, such as 0.5.")
    return faults


def _check_chat_template(recipe: Recipe) -> list[str]:
    name = getattr(recipe.training, "chat_template_path", None)
    if name is None:
        return []
    path, template = Path(name), name.endswith((".jinja", ".j2"))
    if path.is_file() and not template:
        what = "which is a file whose name ends neither in .jinja nor in .j2. Rename it."
    elif path.exists() or not (template or is_local(name)):
        return []
    elif name.startswith("~") and path.expanduser().exists():
        what = f"and `~` is not read there. Write {path.expanduser()}."
    else:
        what = f"and {where_looked(name)} Correct the path, or give the hub id of a tokenizer."
    return [f"`chat_template_path` is {name}, {what}"]


def _check_share(recipe: Recipe, share: str, tokenizer: Any) -> list[str]:
    sources = named(recipe, share)
    if not sources:
        return []
    key = sources[0][0]
    if share == "evaluation":
        key = "dataset_test_split"
    if not all_local(recipe, share):
        hub = ", ".join(source.path for _, source in sources)
        recipe.notes.append(f"not checked: `{key}` {hub} is a hub id")
        return []
    faults = []
    try:
        rows = load_share(recipe, share)
    except DataError as error:
        return [f"`{key}`: {error}"]
    if rows is None:
        return []
    if share == "retain":
        return []  # what is wrong with it shows where the two corpora are paired
    evaluates_attacked = share == "evaluation" and getattr(recipe.training, "eval_under_attack", False)
    under_attack = share == "train" or evaluates_attacked
    pairs = recipe.verb in PAIRED and share != "benign"  # with an attack or without
    needs_rejected = pairs or (under_attack and _needs_rejected(recipe))
    try:
        # What stands in messages during training stands in these, too.
        rows = as_prompt_completion(
            rows,
            "training" if share == "train" else share,
            needs_rejected=needs_rejected,
            needs_prompt=under_attack and recipe.training.needs_prompt,
        )
    except DataError as error:
        return [f"`{key}`: {error}"]
    repeats = getattr(recipe.training, "updates_per_attack", 1) > 1
    if share == "train" and repeats and len(rows) < (block := block_of(recipe)):
        faults.append(
            f"`{key}` has {len(rows)} rows, and one update takes {block} (`per_device_train_batch_size` x "
            "`gradient_accumulation_steps` x processes). With `updates_per_attack` above 1 a batch must be full: "
            "lower one of these, or add rows."
        )
    if recipe.verb == "seal" and share == "train":
        faults += unvisited(recipe, len(rows))
    if tokenizer is not None:
        faults += [f"`{key}`: {fault}" for fault in _check_lengths(recipe, share, rows, tokenizer)]
    return faults


def _needs_rejected(recipe: Recipe) -> bool:
    """As the settings say; a radius or a number of steps below zero, a fault of its own, still means an attack."""
    training = recipe.training
    if is_lap(recipe) or recipe.verb == "seal":
        return False
    searches = training.attack_radius < 0 or training.attack_steps < 0
    return training.needs_rejected or (searches and training.attack_objective in ("targeted", "swapped"))


def _check_lengths(recipe: Recipe, share: str, rows: Dataset, tokenizer: Any) -> list[str]:
    """Prompts that leave no room for a completion; TRL drops their rows, and training then stops."""
    training = recipe.training
    if "prompt" not in rows.column_names or getattr(training, "completion_only_loss", None) is False:
        return []
    if getattr(training, "chat_template_path", None) is not None:
        recipe.notes.append(f"not checked: lengths of prompts ({share}), since `chat_template_path` is given")
        return []
    if len(rows) > LENGTHS_CHECKED:
        recipe.notes.append(f"not checked: lengths of prompts ({share}) after row {LENGTHS_CHECKED}")
    first = rows.select(range(min(len(rows), LENGTHS_CHECKED)))
    if is_conversational({"prompt": first[0]["prompt"]}) and tokenizer.chat_template is None:
        return [
            "The rows are conversations, and the model's tokenizer has no chat template. Give one with "
            "`chat_template_path`, or use plain rows without `chat_format`."
        ]
    plain = not is_conversational({"prompt": first[0]["prompt"]})
    if share == "train" and plain and tokenizer.chat_template is not None:
        recipe.notes.append(
            "The rows are plain and the tokenizer has a chat template, which is not applied to them; attacks apply "
            "it. For a chat model set `chat_format: true`."
        )
    if training.max_length is None or training.max_length < 1:
        return []
    try:
        kept = fitting_rows(first, tokenizer, training.max_length)
        if recipe.benign.drop_long:
            return [f"No row has a prompt shorter than `max_length` {training.max_length}."] if not kept else []
        before = Dataset.from_dict({"row": list(range(len(first)))})
        check_none_lost(before, Dataset.from_dict({"row": kept}), share, training.max_length)
    except (TemplateError, TypeError) as error:  # a template that adds text to what is none
        return [f"The model's chat template does not take these rows: {_line(error)}"]
    except DataError as error:
        return [str(error)]
    return []


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
