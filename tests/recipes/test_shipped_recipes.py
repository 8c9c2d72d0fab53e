"""Every recipe that comes with the package: read strictly, and run for two steps at tiny size."""

import pytest
from recipe_parts import make_workplace

from trl_robust.cli import main
from trl_robust.recipes import load_recipe, recipes_folder, verb_of

RECIPES = sorted(recipes_folder().rglob("*.yaml"))
LAYERS = 32  # as many as the models of the papers have, so that their sites exist


@pytest.fixture(scope="module")
def deep_workplace(tmp_path_factory):
    return make_workplace(
        tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=64
    )


def test_the_recipes_are_found():
    names = {path.relative_to(recipes_folder()).as_posix() for path in RECIPES}
    assert {"lat/llama2_7b_jailbreak.yaml", "lat/llama3_8b_jailbreak.yaml", "quickstart.yaml"} <= names
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_strictly_and_has_a_header(path):
    load_recipe(verb_of(path), ["--config", str(path)], check=False, this_machine=False)
    header = path.read_text(encoding="utf-8").partition("\nverb:")[0]
    for word in ("# Reproduces ", "# Command ", "# Hardware ", str(path.relative_to(recipes_folder().parent))):
        assert word in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(path, deep_workplace, tmp_path, capsys):
    assert verb_of(path) == "lat-sft"
    smaller = {
        "model_name_or_path": deep_workplace / "model",
        "dataset_name": deep_workplace / "preferences.jsonl",
        "benign_dataset_name": deep_workplace / "benign.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "attack_steps": 2,
        "max_length": 64,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    code = main(["lat-sft", "--config", str(path), *words])
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").is_file()


def test_the_published_hyperparameters():
    """papers/lat.md section 5, and nothing that only some other number could have made of it."""
    common = {
        "attack_sites": ["embedding", "8", "16", "24", "30"], "attack_norm": "l2", "attack_radius": 6,
        "attack_radius_unit": "absolute", "attack_ball": "token", "attack_steps": 16, "attack_optimizer": "adamw",
        "attack_toward_coef": 0.5, "attack_away_coef": 0.5, "toward_coef": 0.5, "away_coef": 0.5,
        "updates_per_attack": 4, "max_steps": 400, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8, "weight_decay": 0.01,
    }  # fmt: skip
    own = {
        "llama2_7b_jailbreak": {
            "attack_learning_rate": 5e-2, "attack_positions": "prompt", "sft_coef": 1.5, "kl_coef": 0,
            "learning_rate": 2e-5,
        },
        "llama3_8b_jailbreak": {
            "attack_learning_rate": 1e-3, "attack_positions": "all", "sft_coef": 0, "kl_coef": 0.1,
            "learning_rate": 8e-5,
        },
    }  # fmt: skip
    for name, expected in own.items():
        path = str(recipes_folder() / "lat" / f"{name}.yaml")
        recipe = load_recipe("lat-sft", ["--config", path], check=False, this_machine=False)
        assert {key: getattr(recipe.training, key) for key in common | expected} == common | expected
        assert (recipe.model.lora_r, recipe.model.lora_alpha, recipe.model.lora_dropout) == (64, 8, 0)
        assert len(recipe.model.lora_target_modules) == 6
