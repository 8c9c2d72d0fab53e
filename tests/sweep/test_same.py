"""Which cells are said to be the same beforehand, and that they are."""

import math

import pytest
import torch
from grid_parts import grid_values, write_grid
from recipe_parts import settings
from safetensors.torch import load_file

from trl_robust.scripts import training
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.planning import make_plan
from trl_robust.sweep.same import Shape, adam_reach, effect_of
from trl_robust.sweep.stages import cell_recipe

SHAPE = Shape(num_layers=32, hidden_size=4096)
FREE = {"attack_optimizer": "adamw", "attack_steps": 16, "attack_learning_rate": 1e-3}  # reaches about 1 in l2
SIGN, SEQUENCE = {**FREE, "attack_optimizer": "sign"}, {**FREE, "attack_ball": "sequence"}


@pytest.fixture
def effect(place):
    def found(shape=SHAPE, **changes):
        return effect_of(cell_recipe("lat-sft", settings(place, **changes)), shape)

    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attack_sites": [0.25, 0.5]}, {"attack_sites": [8, 16]}),
        ({"attack_sites": [-1]}, {"attack_sites": [31, 1.0]}),
        ({"attack_radius": 0, "attack_norm": "l1"}, {"attack_radius": 0, "attack_sites": [3]}),
        ({"attack_radius": 0}, {"attack_steps": 0}),
        ({**FREE, "attack_radius": 6}, {**FREE, "attack_radius": 9}),
        ({**FREE, "attack_radius": 6}, {**FREE, "attack_radius": 300, "attack_norm": "l1"}),
        ({**FREE, "attack_radius": 6}, {**FREE, "attack_radius": 0.38, "attack_norm": "linf"}),
        ({**SIGN, "attack_radius": 6}, {**SIGN, "attack_radius": 7}),
        ({**SEQUENCE, "attack_radius": 99}, {**SEQUENCE, "attack_radius": 98}),
        ({"attack_learning_rate": 1}, {"attack_learning_rate": 2}),  # steepest
        ({"attack_objective": "random", "attack_steps": 1}, {"attack_objective": "random", "attack_steps": 9}),
        ({"attack_objective": "untargeted", "attack_toward_coef": 2}, {"attack_objective": "untargeted"}),
        ({"attack_num_sites": 2}, {"attack_num_sites": 3}),  # all are attacked
        ({"refusal_direction_prob": 0.1}, {"refusal_direction_prob": 0.9}),
        ({"kl_form": "log"}, {"kl_form": "mean"}),  # kl_coef is 0
        ({"away_coef": 0, "away_loss": "gradient_ascent"}, {"away_coef": 0}),
        ({"faithful": True, "reset_optimizer": True}, {"faithful": True}),
        ({"sft_coef": 0, "benign_per_example": 3}, {"sft_coef": 0, "benign_dataset_name": None}),
        ({"attack_sites": ["embedding"], "attack_stream": "mlp"}, {"attack_sites": ["embedding"]}),
    ],
)  # fmt: skip
def test_settings_that_never_come_into_effect_make_no_difference(effect, one, other):
    assert effect(**one).key == effect(**other).key
    assert effect(**one).reasons


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attack_sites": [0.25]}, {"attack_sites": [9]}),
        ({**FREE, "attack_radius": 1.0}, {**FREE, "attack_radius": 2.0}),  # 1.02 may be reached: 1 may bind
        ({**FREE, "attack_radius": 6}, {**FREE, "attack_radius": 6, "attack_steps": 17}),
        ({**FREE, "attack_radius": 6, "attack_init": "random"}, {**FREE, "attack_radius": 7, "attack_init": "random"}),
        ({**FREE, "attack_radius": 6, "attack_init": "warm"}, {**FREE, "attack_radius": 7, "attack_init": "warm"}),
        (
            {**FREE, "attack_radius": 6, "attack_radius_unit": "relative"},
            {**FREE, "attack_radius": 7, "attack_radius_unit": "relative"},
        ),
        (
            {**FREE, "attack_radius": 6, "attack_site_choice": "gradient"},
            {**FREE, "attack_radius": 300, "attack_norm": "l1", "attack_site_choice": "gradient"},
        ),
        ({**SEQUENCE, "attack_radius": 6}, {**SEQUENCE, "attack_radius": 7}),
        ({"attack_radius": 6}, {"attack_radius": 9}),  # steepest: its step grows with the radius
        ({"attack_objective": "random", "attack_norm": "l1"}, {"attack_objective": "random"}),
        ({"attack_radius": 0}, {"attack_radius": 0, "updates_per_attack": 2}),
        ({"attack_steps": 0, "attack_objective": "random"}, {"attack_radius": 0}),
        ({"away_coef": 0.5}, {"away_coef": 0.25}),
        ({"learning_rate": 1e-3}, {"learning_rate": 2e-3}),
    ],
)  # fmt: skip
def test_settings_that_may_make_a_difference_are_told_apart(effect, one, other):
    assert effect(**one).key != effect(**other).key


def test_without_the_models_shape_sites_and_radii_are_compared_as_written(effect):
    assert effect(None, attack_sites=[0.25]).key != effect(None, attack_sites=[8]).key
    assert effect(None, **FREE, attack_radius=6).key != effect(None, **FREE, attack_radius=7).key
    assert effect(None, attack_radius=0).key == effect(None, attack_steps=0).key


def worst_case(steps: int) -> list[float]:
    """Gradients that make Adam's last step the longest there is: the optimum of Cauchy and Schwarz."""
    first = [0.1 * 0.9**age / (1 - 0.9**steps) for age in range(steps)]
    second = [0.001 * 0.999**age / (1 - 0.999**steps) for age in range(steps)]
    return [a / b for a, b in zip(first, second, strict=True)][::-1]


def test_adam_never_gets_farther_than_its_reach():
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.full((16,), 1.0), torch.tensor(worst_case(16)), torch.tensor([0.0] * 15 + [1.0])]
    sequences += [torch.randn(16, generator=generator).abs() ** power for power in (0.5, 1, 4, 12)]
    for gradients in sequences:
        point = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([point], lr=0.01, weight_decay=0.0, eps=1e-30)
        for gradient in gradients:
            point.grad = gradient.double().reshape(1)
            optimizer.step()
        assert abs(point.item()) <= adam_reach(16, 0.01) * (1 + 1e-9)
    assert adam_reach(1, 0.01) == pytest.approx(0.01)
    assert 16 < adam_reach(16, 1.0) < 17.5  # so that the published radius, 6 at d = 4096, is far out of reach
    assert adam_reach(16, 1e-3) * math.sqrt(4096) < 1.1


def test_cells_that_are_said_to_be_the_same_give_the_same_weights(place, tmp_path):
    free = {"attack_optimizer": "adamw", "attack_steps": 2, "attack_learning_rate": 1e-3}
    pairs = [
        ({"attack_sites": ["embedding", 1]}, {"attack_sites": [0.25, "embedding"]}),
        ({**free, "attack_radius": 3}, {**free, "attack_radius": 0.5, "attack_norm": "linf"}),
        ({"attack_radius": 0, "attack_norm": "l1"}, {"attack_steps": 0}),
    ]
    shape = Shape(num_layers=4, hidden_size=24)
    for number, pair in enumerate(pairs):
        weights, keys = [], []
        for side, changes in enumerate(pair):
            values = settings(place, **changes, output_dir=str(tmp_path / f"{number}-{side}"))
            keys.append(effect_of(cell_recipe("lat-sft", settings(place, **changes)), shape).key)
            training.run(cell_recipe("lat-sft", values, check=True, this_machine=True), quiet=True)
            weights.append(load_file(tmp_path / f"{number}-{side}" / "model.safetensors"))
        assert keys[0] == keys[1]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_dry_run_says_it_and_the_baseline_stands_for_its_like(place, tmp_path):
    cells = {"by fraction": {"attack_sites": ["embedding", 0.25]}, "usual": {}, "l1": {"attack_norm": "l1"}}
    grid = load_grid(write_grid(tmp_path / "grid.yaml", grid_values(place, cells=cells, seeds=[0, 1])))
    plan = make_plan(grid)
    assert plan.same == {"by fraction": ("usual", "the sites are embedding, 1 of 4 layers")}
    runs = [(run.name, run.seed) for run in plan.runs]
    assert runs == [("before training", 0), ("usual", 0), ("l1", 0), ("usual", 1), ("l1", 1)]
