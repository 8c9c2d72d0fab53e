"""The pipeline of docs/lat_dpo.md: an adapter from lat-sft goes on in lat-dpo, or, merged, in stock DPO."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from recipe_parts import settings, write_recipe
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from trl_robust.cli import main
from trl_robust.data import load_rows

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "learning_rate": 1e-2}
DPO = {"away_coef": None, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, workplace):
    folder = tmp_path_factory.mktemp("pipeline")
    path = write_recipe(folder / "sft.yaml", settings(workplace, **LORA, output_dir=str(folder / "sft")))
    assert main(["lat-sft", "--config", path]) == 0
    return folder / "sft"


def test_the_adapter_is_trained_further_against_a_frozen_copy_of_itself(adapter, workplace, tmp_path, capsys):
    values = settings(workplace, **DPO, model_name_or_path=str(adapter), output_dir=str(tmp_path / "dpo"))
    assert main(["lat-dpo", "--config", write_recipe(tmp_path / "dpo.yaml", values)]) == 0
    words = "with the adapter that is trained further, as it was before this training (a frozen copy)"
    assert f"Reference: {workplace / 'model'} {words}." in capsys.readouterr().err
    assert words in json.loads((tmp_path / "dpo" / "run.json").read_text())["reference"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "dpo"))
    reference = load_file(tmp_path / "dpo" / "ref" / "adapter_model.safetensors")
    assert before.keys() == after.keys() == reference.keys()
    assert all(torch.equal(before[name], reference[name]) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    read = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "dpo")
    assert read.active_adapter == "default"


def test_a_new_adapter_has_the_base_model_as_its_reference(workplace, tmp_path, capsys):
    values = settings(workplace, **{**DPO, **LORA}, output_dir=str(tmp_path / "dpo"))
    assert main(["lat-dpo", "--config", write_recipe(tmp_path / "dpo.yaml", values)]) == 0
    assert f"Reference: {workplace / 'model'} with its adapters off." in capsys.readouterr().err


def test_a_model_trained_whole_has_a_second_copy_as_its_reference(workplace, tmp_path, capsys):
    values = settings(workplace, **DPO, output_dir=str(tmp_path / "dpo"))
    assert main(["lat-dpo", "--config", write_recipe(tmp_path / "dpo.yaml", values)]) == 0
    assert "as it was before this training (a second copy of all its weights)" in capsys.readouterr().err


def test_merged_it_goes_on_in_stock_dpo(adapter, workplace, tmp_path, tokenizer):
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    trainer = DPOTrainer(
        model=str(tmp_path / "merged"),
        args=DPOConfig(str(tmp_path / "dpo"), use_cpu=True, bf16=False, report_to="none", max_steps=1),
        train_dataset=load_rows(str(workplace / "preferences.jsonl")),
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_recipe_for_one_verb_is_refused_by_another_with_its_faults_at_once(workplace, tmp_path, capsys):
    values = settings(workplace, output_dir=str(tmp_path / "dpo"), retain_dataset_name="w/none.jsonl")
    assert main(["lat-dpo", "--config", write_recipe(tmp_path / "dpo.yaml", values)]) == 1
    err = capsys.readouterr().err
    assert "`away_coef`" in err and "is not a key" in err
    assert "`retain_dataset_name` belongs to lat-sft and lat-rmu" in err
    values = settings(workplace, away_coef=None, output_dir=str(tmp_path / "rmu"))
    assert main(["lat-rmu", "--config", write_recipe(tmp_path / "rmu.yaml", values)]) == 1
    assert "lat-rmu takes no benign dataset" in capsys.readouterr().err
