"""Forward passes, FLOPs and lengths of rows against those of real runs."""

import json

import pytest
from cost import estimated, recipe_values
from recipe_parts import write_recipe
from torch.utils.flop_counter import FlopCounterMode

from trl_robust.recipes import load_recipe
from trl_robust.scripts.training import run

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}

CASES = {
    "toward, away and benign, from the embedding": ("lat-sft", {}),
    "held, accumulated, a cached prefix, KL": (
        "lat-sft",
        {
            "attack_sites": [1, 3],
            "attack_away_coef": 0.5,
            "attack_optimizer": "adamw",
            "attack_learning_rate": 1.0,
            "kl_coef": 0.3,
            "updates_per_attack": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
        },
    ),
    "by epochs, a last batch that is not full, no away term": (
        "lat-sft",
        {
            "max_steps": None,
            "num_train_epochs": 1.3,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "away_coef": 0.0,
            "sft_coef": 0.0,
            "kl_coef": 0.1,
            "benign_per_example": 2,
        },
    ),
    "adapters, checkpointed": (
        "lat-sft", {**LORA, "lora_target_modules": ["q_proj", "v_proj"], "activation_checkpointing": True}
    ),
    "MLP, relative radius, untargeted, no benign rows": (
        "lat-sft",
        {
            "attack_stream": "mlp",
            "attack_sites": [3],
            "attack_radius_unit": "relative",
            "attack_objective": "untargeted",
            "away_coef": 0.0,
            "benign_dataset_name": None,
        },
    ),
    "random": ("lat-sft", {"attack_objective": "random", "attack_sites": [2]}),
    "faithful, some layers": (
        "lat-sft",
        {
            "faithful": True,
            "gradient_accumulation_steps": 3,
            "updates_per_attack": 2,
            "trained_layers": ["3"],
            "attack_sites": [2],
        },
    ),
    "refusal direction": (
        "lat-sft",
        {"attack_objective": "refusal_direction", "refusal_direction_every": 2, "max_steps": 3, "sft_coef": 0.5},
    ),
    "DPO, pairs swapped": ("lat-dpo", {"attack_sites": [1]}),
    "DPO, targeted, adapters, KL": (
        "lat-dpo", {**LORA, "attack_objective": "targeted", "attack_away_coef": 1.0, "kl_coef": 0.1}
    ),
    "RMU": ("lat-rmu", {"rmu_layer": "3", "attack_sites": [2]}),
}  # fmt: skip


@pytest.mark.usefixtures("without_rehearsal")
@pytest.mark.parametrize("name", CASES)
def test_passes_updates_and_lengths_are_those_of_the_run_and_flops_within_five_percent(name, workplace, tmp_path):
    verb, changes = CASES[name]
    values = recipe_values(workplace, verb, **changes, output_dir=str(tmp_path / "run"))
    path = write_recipe(tmp_path / "recipe.yaml", values)
    found = estimated(verb, path)

    with FlopCounterMode(display=False) as counter:
        trainer = run(load_recipe(verb, ["--config", path]), quiet=True)
    phase = json.loads((tmp_path / "run" / "run.json").read_text())["phases"]["train"]
    assert found.schedule.updates == phase["updates"]
    assert found.total.forward_passes == pytest.approx(phase["forward_passes"], rel=1e-9)
    # What is left out: the first trained layer needs no gradient of its own input.
    assert found.total.flops == pytest.approx(counter.get_total_flops(), rel=0.05)

    row = trainer.train_dataset[0]
    tokens = [*row["prompt_ids"], *row["chosen_ids"]] if verb == "lat-dpo" else row["input_ids"]
    assert sum(found.rows.shares["chosen"][0]) == len(tokens)
    if "benign" in found.rows.shares:
        assert sum(found.rows.shares["benign"][0]) == len(row["benign_input_ids"][0])
