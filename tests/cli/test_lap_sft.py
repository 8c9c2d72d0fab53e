"""`lap-sft` and `lap-dpo` by recipe, and the paper's pipeline: LAP, then ordinary DPO."""

import json

import pytest
from peft import AutoPeftModelForCausalLM
from recipe_parts import settings, write_recipe
from trl import DPOConfig, DPOTrainer

from trl_robust.cli import main
from trl_robust.data import load_rows

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"], "learning_rate": 1e-2}


def lap(place, **changes):
    """A recipe for LAP: that of the others without what belongs to LAT."""
    kept = {
        name: value
        for name, value in settings(place).items()
        if not name.startswith(("attack_", "benign_", "toward_", "away_", "sft_", "kl_"))
    }
    return {**kept, "verb": "lap-sft", "lap_layers": ["1"], "lap_steps": 2, "lap_branch": "adv_only", **changes}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, workplace):
    folder = tmp_path_factory.mktemp("lap")
    path = write_recipe(folder / "lap.yaml", lap(workplace, **LORA, output_dir=str(folder / "sft")))
    assert main(["lap-sft", "--config", path]) == 0
    return folder / "sft"


def test_a_run_leaves_its_branches_its_card_and_a_recipe_that_gives_it_again(adapter):
    record = json.loads((adapter / "run.json").read_text())
    assert record["verb"] == "lap-sft" and record["finished"]
    branches = record["branches"]
    assert branches["updates"]["perturbed"] == record["phases"]["train"]["updates"] > 0
    assert branches["nonfinite_rows"] == 0 < branches["searched_rows"]
    assert record["phases"]["train"]["forward_passes"] > 0
    assert "## Latent adversarial paraphrasing" in (adapter / "README.md").read_text()
    assert "lap_steps: 2" in (adapter / "recipe.yaml").read_text()


def test_merged_it_goes_on_in_stock_dpo_as_the_paper_does(adapter, workplace, tmp_path, tokenizer):
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


def test_the_joint_form_goes_on_from_the_adapter_and_says_what_its_reference_is(adapter, workplace, tmp_path, capsys):
    values = lap(workplace, verb="lap-dpo", model_name_or_path=str(adapter), output_dir=str(tmp_path / "dpo"))
    assert main(["lap-dpo", "--config", write_recipe(tmp_path / "dpo.yaml", values)]) == 0
    assert "as it was before this training (a frozen copy)" in capsys.readouterr().err
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["branches"]["updates"]["perturbed"] > 0


def test_all_faults_of_a_recipe_are_told_at_once_in_the_words_of_its_keys(workplace, tmp_path, capsys):
    values = lap(
        workplace,
        lap_layers=["9"],
        lap_epsilonn=1,
        lap_alpha=-1,
        benign_dataset_name=str(workplace / "benign.jsonl"),
        output_dir=str(tmp_path / "run"),
    )
    assert main(["lap-sft", "--config", write_recipe(tmp_path / "lap.yaml", values)]) == 1
    err = capsys.readouterr().err
    assert "did you mean `lap_epsilon`" in err
    assert "`lap_alpha` is -1" in err
    assert "lap-sft takes no benign dataset" in err
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_model_does_not_have_is_refused_before_anything_is_loaded(workplace, tmp_path, capsys):
    values = lap(workplace, lap_layers=["9"], output_dir=str(tmp_path / "run"))
    assert main(["lap-sft", "--config", write_recipe(tmp_path / "lap.yaml", values)]) == 1
    assert "`lap_layers`: Layer 9 does not exist" in capsys.readouterr().err
