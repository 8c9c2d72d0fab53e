"""Rows that are left out when a recipe asks for it, and empty texts of corpora."""

import json

import pytest
from recipe_parts import make_adapter, settings, write_recipe, write_rows

from trl_robust.cli import main

LONG = {"prompt": " ".join(["w1"] * 70), "chosen": " w2", "rejected": " w3"}
SHORT = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}


@pytest.mark.parametrize("verb", ["lat-sft", "lat-dpo"])
def test_long_prompts_stop_a_run_unless_they_are_to_be_left_out(verb, workplace, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [SHORT, LONG, SHORT, SHORT, LONG, SHORT])
    changes = {} if verb == "lat-sft" else {"away_coef": None}
    values = settings(workplace, **changes, dataset_name=str(rows), output_dir=str(tmp_path / "run"), max_steps=1)
    assert main([verb, "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 1
    assert "2 rows (1, 4)" in capsys.readouterr().err
    assert main([verb, "--config", write_recipe(tmp_path / "recipe.yaml", {**values, "drop_long": True})]) == 0
    assert "2 of 6 train rows are left out (`drop_long`)" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["dropped_rows"] == {"train": 2, "benign": 0}
    assert record["datasets"]["train"]["rows"] == 4


def test_a_dataset_of_long_prompts_alone_is_a_fault_all_the_same(workplace, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [LONG])
    values = settings(workplace, dataset_name=str(rows), output_dir=str(tmp_path / "run"), drop_long=True)
    assert main(["lat-sft", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 1
    assert "No row has a prompt shorter than `max_length` 64" in capsys.readouterr().err


def test_empty_texts_of_a_benign_corpus_are_left_out_with_a_note(workplace, tmp_path, capsys):
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in ("w1 w2 w3", "", " ", "w4 w5 w6")])
    values = settings(workplace, benign_dataset_name=str(corpus), output_dir=str(tmp_path / "run"), max_steps=1)
    assert main(["lat-sft", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 0
    assert "2 empty texts of the benign dataset are left out" in capsys.readouterr().err


def test_an_adapter_without_a_tokenizer_takes_its_base_models(workplace, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", workplace)
    for path in adapter.glob("*token*"):
        path.unlink()
    rows = write_rows(tmp_path / "rows.jsonl", [SHORT, LONG, SHORT])
    values = settings(workplace, model_name_or_path=str(adapter), dataset_name=str(rows), drop_long=True, max_steps=1)
    values |= {"output_dir": str(tmp_path / "run")}
    assert main(["lat-sft", "--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 0
    assert "1 of 3 train rows are left out" in capsys.readouterr().err
