"""Every recipe that comes with the package: read strictly, and run for two steps at tiny size."""

import json
from collections import Counter

import pytest
import yaml
from recipe_parts import layers_for, make_adapter, make_workplace

from trl_robust.cli import main
from trl_robust.recipes import load_recipe, recipes_folder, verb_of

# Those of grids and of evaluations are for no training verb. For LAP see test_shipped_lap_recipes.py.
RECIPES = sorted(
    path for path in recipes_folder().rglob("*.yaml") if path.parent.name not in ("ablations", "eval", "lap", "seal")
)
PAIRS = {"dataset_name": "preferences.jsonl", "benign_dataset_name": "benign.jsonl"}
CORPORA = {
    "dataset_name": "forget.jsonl",
    "retain_dataset_name": "retain.jsonl",
    "benign_dataset_name": "texts.jsonl",
}
GENERIC_LABELS = {"dataset_name": "generic_labels.jsonl", "benign_dataset_name": "texts.jsonl"}


@pytest.fixture(scope="module")
def workplace_of(tmp_path_factory):
    """A workplace for a recipe, whose model and adapter are as deep as it needs."""
    made = {}

    def of(given: dict):
        layers = layers_for(given)
        if layers not in made:
            folder = tmp_path_factory.mktemp(f"layers-{layers}")
            made[layers] = make_workplace(folder, num_hidden_layers=layers, hidden_size=32, intermediate_size=64)
            make_adapter(folder / "adapter", folder)
        return made[layers]

    return of


def read(name, verb="lat-sft"):
    path = recipes_folder() / "lat" / f"{name}.yaml"
    return load_recipe(verb, ["--config", str(path)], check=False, this_machine=False)


def keys(name):
    return yaml.safe_load((recipes_folder() / "lat" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_the_recipes_are_found():
    names = {path.relative_to(recipes_folder()).as_posix() for path in RECIPES}
    assert {"lat/llama2_7b_jailbreak.yaml", "lat/llama3_8b_jailbreak.yaml", "quickstart.yaml"} <= names
    assert Counter(path.parent.name for path in RECIPES) == {"lat": 19, "organism": 4, "recipes": 1}
    assert {verb_of(path) for path in RECIPES} == {"lat-sft", "lat-dpo", "lat-rmu"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_strictly_and_has_a_header(path):
    load_recipe(verb_of(path), ["--config", str(path)], check=False, this_machine=False)
    header = path.read_text(encoding="utf-8").partition("\nverb:")[0]
    name = str(path.relative_to(recipes_folder().parent))
    for word in ("# Reproduces ", "# Command ", "# Hardware ", f"trl-robust {verb_of(path)} --config {name}"):
        assert word in header
    if "use_cpu: true" not in path.read_text(encoding="utf-8"):
        for word in ("NOT RUN ON A GPU BY US YET", "# Published ", "# Obtained ", "# Our reading "):
            assert word in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(path, workplace_of, tmp_path, capsys):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    workplace = workplace_of(given)
    files = GENERIC_LABELS if path.stem == "whp_lat" else CORPORA if "retain_dataset_name" in given else PAIRS
    smaller = {
        "model_name_or_path": workplace / ("adapter" if path.stem == "dpo_after_lat" else "model"),
        **{key: workplace / file for key, file in files.items() if key in given},
        **{key: "train" for key in given if key in ("retain_dataset_split", "benign_dataset_split")},  # a file has one
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "attack_steps": min(given.get("attack_steps", 2), 2),
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    words = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    code = main([verb_of(path), "--config", str(path), *words])
    assert code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["phases"]["train"]["updates"] == 2
    # Every term that the recipe weighs was there, and so was the attack.
    losses = record["losses"]
    assert {f"{term}_loss" for term in ("toward", "away", "sft", "kl") if given.get(f"{term}_coef")} <= losses.keys()
    searches = given.get("attack_steps", 0) > 0
    assert ("attack_loss_after" in losses) == searches
    assert None not in losses.values()  # none was infinite or not a number


L2 = {"attack_norm": "l2", "attack_radius_unit": "absolute", "attack_ball": "token", "attack_stream": "layer"}
ADAMW = L2 | {"attack_steps": 16, "attack_optimizer": "adamw", "attack_learning_rate": 5e-2}
JAILBREAK = ADAMW | {
    "attack_sites": ["embedding", "8", "16", "24", "30"], "attack_radius": 6,
    "attack_toward_coef": 0.5, "attack_away_coef": 0.5, "toward_coef": 0.5, "away_coef": 0.5,
    "updates_per_attack": 4, "max_steps": 400, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8, "weight_decay": 0.01, "max_grad_norm": 1,
}  # fmt: skip
LLAMA3 = JAILBREAK | {
    "attack_learning_rate": 1e-3, "attack_positions": "all", "sft_coef": 0, "kl_coef": 0.1, "learning_rate": 8e-5,
}  # fmt: skip
DPO = ADAMW | {
    "attack_objective": "swapped", "attack_sites": ["4", "12", "20", "28"], "attack_radius": 1.5,
    "attack_positions": "prompt", "beta": 0.3, "loss_type": ["sigmoid"], "max_steps": 1024, "learning_rate": 2e-5,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_grad_norm": 1, "max_length": 512,
    "updates_per_attack": 4,
}  # fmt: skip
UNLEARNING = ADAMW | {
    "attack_positions": "all", "attack_toward_coef": 1, "updates_per_attack": 4, "learning_rate": 5e-5,
}  # fmt: skip
WMDP = UNLEARNING | {
    "attack_sites": ["7"], "attack_radius": 2, "attack_away_coef": 1, "max_steps": 800,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
}  # fmt: skip
CAT = {
    "attack_sites": ["embedding"], "attack_positions": "prompt", "attack_norm": "l2", "attack_radius": 0.05,
    "attack_radius_unit": "relative", "attack_ball": "token", "attack_steps": 10, "attack_optimizer": "sign",
    "attack_learning_rate": 1e-4, "attack_init": "zero", "attack_objective": "targeted", "attack_toward_coef": 1,
    "attack_away_coef": 0, "updates_per_attack": 1, "learning_rate": 2e-4, "lr_scheduler_type": "cosine",
    "weight_decay": 1e-3, "max_grad_norm": 0.3, "warmup_steps": 0,
}  # fmt: skip

PUBLISHED = {
    "llama2_7b_jailbreak": JAILBREAK | {
        "attack_positions": "prompt", "sft_coef": 1.5, "kl_coef": 0, "learning_rate": 2e-5,
    },
    "llama3_8b_jailbreak": LLAMA3 | {"faithful": False},
    "llama3_8b_jailbreak_faithful": LLAMA3 | {"faithful": True},
    "backdoor_dpo_lat": DPO,
    "backdoor_dpo": DPO | {"attack_steps": 0, "updates_per_attack": 1, "attacks": False},
    "whp_lat": UNLEARNING | {
        "attack_sites": ["12"], "attack_radius": 1.5, "attack_away_coef": 0, "toward_coef": 1, "away_coef": 1,
        "sft_coef": 1, "trained_layers": ["13", "14", "15"], "trained_modules": [], "max_steps": 400,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "max_grad_norm": 1, "max_length": 2048,
    },
    "wmdp_ga_lat": WMDP | {
        "toward_coef": 1, "away_coef": 1, "sft_coef": 4, "max_grad_norm": 0.5, "max_length": 600,
    },
    "wmdp_rmu_lat": WMDP | {
        "rmu_layer": "8", "rmu_steering_coef": 6.5, "rmu_retain_coef": 1200, "trained_layers": ["6", "7", "8"],
        "trained_modules": ["down_proj"], "max_grad_norm": 0, "max_length": 768,
    },
    "untargeted": L2 | {
        "attack_objective": "untargeted", "attack_sites": ["3"], "attack_positions": "all", "attack_radius": 8,
        "attack_ball": "sequence", "attack_steps": 6, "attack_optimizer": "steepest", "attack_init": "random",
        "toward_coef": 1, "away_coef": 0, "learning_rate": 5e-6, "weight_decay": 6e-4, "max_grad_norm": 0.25,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "lr_scheduler_type": "constant",
        "max_length": 512, "num_train_epochs": 1,
    },
    "refat": {
        "attack_objective": "refusal_direction", "attack_sites": [str(layer) for layer in range(32)],
        "attack_positions": "all", "attacks": True, "toward_coef": 1, "away_coef": 0, "sft_coef": 1,
    },
    "cat": CAT | {
        "toward_coef": 0.5, "away_coef": 0.5, "sft_coef": 1, "toward_cutoff": 0.5, "away_cutoff": 5,
        "away_loss": "gradient_ascent", "max_length": 256,
    },
    "capo": CAT | {
        "loss_type": ["ipo"], "beta": 0.25, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8,
        "max_length": 128,
    },
}  # fmt: skip
"""Settings that a paper or its public code gives."""

NOTEBOOK = (64, 8, 0, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])  # 8 and 0: PEFT's defaults
ADAPTERS = {
    "llama2_7b_jailbreak": NOTEBOOK, "llama3_8b_jailbreak": NOTEBOOK, "backdoor_dpo_lat": NOTEBOOK,
    "wmdp_ga_lat": NOTEBOOK, "cat": (64, 16, 0.1, "all-linear"), "capo": (64, 16, 0.1, "all-linear"),
    "whp_lat": None, "wmdp_rmu_lat": None, "untargeted": None,
}  # fmt: skip
"""Rank, alpha, dropout and modules of LoRA that a paper's public code gives; none where it trains the model's own."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_hyperparameters(name):
    """papers/lat.md sections 2.2, 5 and 10, and nothing that only some other number could have made of it."""
    recipe = read(name, keys(name)["verb"])
    assert {key: getattr(recipe.training, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    if name in ADAPTERS:
        model = recipe.model
        adapter = (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules)
        assert (adapter if model.use_peft else None) == ADAPTERS[name]


def test_an_eighth_of_the_rows_of_cat_are_attacked():
    training = read("cat").training
    attacked, benign = training.per_device_train_batch_size, training.benign_per_example
    assert (attacked + benign) * training.gradient_accumulation_steps == 64
    assert attacked / (attacked + benign) == 0.125


@pytest.mark.parametrize(
    ("name", "of", "differing"),
    [
        ("llama3_8b_jailbreak_faithful", "llama3_8b_jailbreak", {"faithful": True}),
        ("eat", "llama3_8b_jailbreak", {"attack_sites": ["embedding"]}),
        ("random_control", "llama3_8b_jailbreak", {"attack_objective": "random", "attack_radius": 1.0}),
        ("backdoor_dpo", "backdoor_dpo_lat", {"attack_steps": 0, "updates_per_attack": 1}),
    ],
)
def test_a_recipe_to_compare_with_differs_in_what_its_header_says_alone(name, of, differing):
    assert keys(name) == keys(of) | differing | {"output_dir": keys(name)["output_dir"]}


def test_the_random_control_is_as_long_as_the_attack_can_get():
    attacked, control = read("llama3_8b_jailbreak").training, read("random_control").training
    reach = attacked.attack_steps * attacked.attack_learning_rate * 4096**0.5  # lat.md 2.3
    assert control.attack_radius == pytest.approx(reach, rel=0.05)
    assert reach < attacked.attack_radius
