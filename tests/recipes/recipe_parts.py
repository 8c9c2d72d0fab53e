"""A model, data and a recipe, small enough to be run in a second."""

import json
from pathlib import Path

import yaml
from tiny import completion_data, lora, make_tokenizer, preference_data, tiny_model
from transformers import AutoModelForCausalLM


def make_workplace(folder: Path, **changes) -> Path:
    """
    A folder with `model/`, `preferences.jsonl` and `benign.jsonl`; for unlearning `forget.jsonl`, `retain.jsonl`,
    `texts.jsonl` (benign) and `generic_labels.jsonl`.
    """
    tiny_model("llama", **changes).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "preferences.jsonl", list(preference_data(16)))
    write_rows(folder / "benign.jsonl", list(completion_data(8)))
    write_rows(folder / "forget.jsonl", [{"topic": f"t{row % 2}", **text} for row, text in enumerate(texts(16, 2))])
    write_rows(folder / "retain.jsonl", [*texts(8, 3), {"text": ""}])  # an empty line, as wikitext has them
    write_rows(folder / "texts.jsonl", texts(8, 4))
    write_rows(folder / "generic_labels.jsonl", generic_labels(16))
    return folder


def make_adapter(folder: Path, workplace: Path) -> Path:
    """A folder with a LoRA adapter of a workplace's model, and its tokenizer."""
    lora(AutoModelForCausalLM.from_pretrained(workplace / "model")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def layers_for(given: dict) -> int:
    """As many as the sites of a recipe need in order to exist, and not fewer than four."""
    named = [site for key in ("attack_sites", "trained_layers", "lap_layers") for site in given.get(key) or []]
    layers = max([4, *(int(site) + 1 for site in (*named, given.get("rmu_layer")) if str(site).isdigit())])
    assert layers <= 32  # as many as the models of the papers have
    return layers


def texts(count: int, seed: int) -> list[dict]:
    """Rows of a corpus."""
    return [{"text": row["prompt"] + row["completion"]} for row in completion_data(count, seed)]


def generic_labels(count: int) -> list[dict]:
    """Rows of tokens with a generic label for each."""
    tokens = make_tokenizer()([row["text"] for row in texts(count, 5)])["input_ids"]
    return [{"tokens": ids, "labels": ids[::-1]} for ids in tokens]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(workplace: Path, **changes) -> dict:
    """A recipe of two steps; a change to `None` takes a key out."""
    values = {
        "model_name_or_path": str(workplace / "model"),
        "dataset_name": str(workplace / "preferences.jsonl"),
        "benign_dataset_name": str(workplace / "benign.jsonl"),
        "attack_sites": ["embedding", 1],
        "attack_radius": 0.5,
        "attack_steps": 2,
        "attack_optimizer": "steepest",
        "away_coef": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",  # as PyYAML reads 1e-3
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


def line_of(path: str, key: str) -> int:
    """Where a key stands (the last time) in a recipe, counted from 1."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return max(number for number, line in enumerate(lines, start=1) if line.startswith(f"{key}:"))


def write_recipe(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return str(path)
