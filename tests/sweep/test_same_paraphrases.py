"""Which cells of LAP grids are said to be the same beforehand, and that they are."""

import pytest
import torch
from recipe_parts import settings
from safetensors.torch import load_file

from trl_robust.scripts import training
from trl_robust.sweep.same import Shape, effect_of
from trl_robust.sweep.stages import cell_recipe

SHAPE = Shape(num_layers=32, hidden_size=4096)
OTHERS = ("attack_sites", "attack_radius", "attack_steps", "attack_optimizer", "away_coef", "benign_dataset_name")


def values(place, **changes):
    """A LAP recipe of two steps on the tiny model."""
    own = settings(place, **dict.fromkeys(OTHERS), dataset_name=str(place / "benign.jsonl"))
    return own | {"lap_layers": [1], "lap_steps": 2, "lap_adv_prob": 0.5} | changes


@pytest.fixture
def effect(place):
    def found(verb="lap-sft", shape=SHAPE, **changes):
        if verb == "lap-dpo":
            changes = {"dataset_name": str(place / "preferences.jsonl"), **changes}
        return effect_of(cell_recipe(verb, values(place, **changes)), shape)

    return found


PLAIN = {"lap_branch": "sft_only"}
FIXED = {"lap_alpha": 0}
NONE = {"lap_lambda_init": 0}
UNTARGETED = {"lap_search": "untargeted"}
COSTLY = {"lap_match_compute": True}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PLAIN, {**PLAIN, "lap_epsilon": 0.3, "lap_layers": [5], "lap_preset": "paper", "lap_alpha": 7}),
        (PLAIN, {"lap_steps": 0}),
        (PLAIN, {"lap_adv_prob": 0}),
        (PLAIN, {**COSTLY, "lap_steps": 0}),  # costs what plain training does
        (COSTLY, {**COSTLY, "lap_epsilon": 0.3, "lap_search": "random"}),
        ({**COSTLY, "lap_layers": [16]}, {**COSTLY, "lap_layers": [0.5, 31]}),  # the lowest decides the cost
        ({"lap_layers": [0.25, 0.5]}, {"lap_layers": [16, 8]}),
        ({"lap_branch": "adv_only", "lap_adv_prob": 0.3}, {"lap_branch": "adv_only"}),
        ({"lap_branch": "both", "lap_adv_prob": 0.3}, {"lap_branch": "both"}),
        ({"lap_branch": "adv_only"}, {"lap_adv_prob": 1}),
        ({"lap_radius": 0.3}, {"lap_radius": 0.4}),
        ({**UNTARGETED, "lap_epsilon": 0.3, "lap_alpha": 1, "lap_preset": "paper"}, UNTARGETED),
        ({}, {"lap_alpha": 2.0, "lap_violation": "abs"}),  # the preset's own
        ({"lap_preset": "paper_rms", "lap_learning_rate": 0.5}, {
            "lap_preset": "paper", "lap_optimizer": "adamw", "lap_norm": "rms", "lap_init_scale": 1e-3,
        }),
        (FIXED, {**FIXED, "lap_violation": "signed", "lap_max_log_step": 9, "lap_lambda_max": 7}),
        (NONE, {**NONE, "lap_alpha": 9, "lap_lambda_max": 7, "lap_violation": "signed"}),
    ],
)  # fmt: skip
def test_settings_that_never_come_into_effect_make_no_difference(effect, one, other):
    assert effect(**one).key == effect(**other).key
    assert effect(**one).reasons or effect(**other).reasons


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"lap_epsilon": 0.06}),
        ({}, {"lap_layers": [2]}),
        ({}, {"lap_adv_prob": 0.6}),
        ({}, {"lap_search": "random"}),
        ({}, {"lap_lambda_persist": "ema"}),
        ({}, {"lap_positions": "last_user"}),
        ({}, {"lap_alpha": 3}),
        ({}, PLAIN),
        (PLAIN, COSTLY),
        (COSTLY, {**COSTLY, "lap_steps": 3}),
        (UNTARGETED, {**UNTARGETED, "lap_radius": 0.3}),
        (UNTARGETED, {**UNTARGETED, "lap_steps": 3}),
        (FIXED, {**FIXED, "lap_lambda_init": 0.2}),
        (FIXED, {**FIXED, "lap_lambda_max": 0.05}),  # below it: the bound moves it once
        ({**NONE, "lap_lambda_persist": "ema"}, NONE),
        (PLAIN, {**PLAIN, "neftune_noise_alpha": 5}),
        (PLAIN, {**PLAIN, "learning_rate": 2e-3}),
    ],
)
def test_settings_that_may_make_a_difference_are_told_apart(effect, one, other):
    assert effect(**one).key != effect(**other).key


def test_without_the_models_depth_layers_and_costs_are_compared_as_written(effect):
    assert effect(shape=None, lap_layers=[0.25]).key != effect(shape=None, lap_layers=[8]).key
    assert effect(shape=None, **COSTLY, lap_layers=[0.25]).key != effect(shape=None, **COSTLY, lap_layers=[8]).key
    assert effect(shape=None, **COSTLY, lap_epsilon=0.3).key == effect(shape=None, **COSTLY).key


def test_pairs_pay_for_their_reference_so_that_the_control_for_cost_is_shorter(effect):
    ratios = [effect(verb, **COSTLY).settings["lap_match_compute"] for verb in ("lap-sft", "lap-dpo")]
    searched = 1 + 3 * 30 / 32
    assert [float(ratio.split()[0]) for ratio in ratios] == [
        pytest.approx(1 + searched / 2 / 3),
        pytest.approx(1 + searched / 2 / 4),
    ]


def test_cells_that_are_said_to_be_the_same_give_the_same_weights(place, tmp_path):
    pairs = [
        ({"lap_branch": "adv_only", "lap_layers": [1]}, {"lap_adv_prob": 1, "lap_layers": [0.25], "lap_alpha": 2}),
        ({**FIXED, "lap_violation": "signed", "lap_adv_prob": 1}, {**FIXED, "lap_max_log_step": 1, "lap_adv_prob": 1}),
    ]
    shape = Shape(num_layers=4, hidden_size=24)
    for number, pair in enumerate(pairs):
        weights, keys = [], []
        for side, changes in enumerate(pair):
            own = values(place, **changes, output_dir=str(tmp_path / f"{number}-{side}"))
            keys.append(effect_of(cell_recipe("lap-sft", values(place, **changes)), shape).key)
            training.run(cell_recipe("lap-sft", own, check=True, this_machine=True), quiet=True)
            weights.append(load_file(tmp_path / f"{number}-{side}" / "model.safetensors"))
        assert keys[0] == keys[1]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
