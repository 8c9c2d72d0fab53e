"""Every grid that comes with the package: read strictly, and its numbers recomputed."""

import functools
import math

import pytest

from trl_robust.recipes import recipes_folder, verb_of
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.planning import make_plan
from trl_robust.sweep.stages import cell_recipe
from trl_robust.threat.sites import resolve_sites

FOLDER = recipes_folder() / "ablations"
GRIDS = sorted(FOLDER.rglob("*.yaml"))

grid_of = functools.cache(load_grid)
plan_of = functools.cache(lambda path: make_plan(grid_of(path)))


def test_the_grids_are_found():
    assert [path.stem for path in GRIDS] == [
        "lap_epsilon", "lap_fig5", "lap_layers", "lap_multi_turn", "lap_several_layers",
        "llama3_extras", "llama3_layers", "llama3_norms", "organism_adversaries",
        "organism_lap_epsilon", "organism_lap_layers", "organism_layers", "organism_norms",
        "organism_seal_functions", "organism_seal_keep", "organism_seal_penalty", "organism_seal_safe_size",
        "seal_functions", "seal_keep", "seal_penalty", "seal_safe_size",
    ]  # fmt: skip
    # Where training recipes are looked for there is no grid, and here nothing else.
    assert {verb_of(path) for path in GRIDS} == {"sweep"}
    others = [path for path in recipes_folder().rglob("*.yaml") if path not in GRIDS]
    assert others and "sweep" not in {verb_of(path) for path in others}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_is_read_strictly_and_has_a_header(path):
    header = path.read_text(encoding="utf-8").partition("\nverb:")[0]
    for word in ("# Reproduces ", "# Command ", "# Hardware ", "# Expected ", f"recipes/ablations/{path.name}"):
        assert word in header
    assert f"each of {len(plan_of(path).runs)} runs" in " ".join(header.replace("#", " ").split())


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_no_cell_of_a_shipped_grid_is_another_one_in_disguise(path):
    assert plan_of(path).same == {}


def sites(name: str, depth: int) -> dict[str, tuple]:
    grid = grid_of(FOLDER / f"{name}.yaml")
    recipes = {cell.name: cell_recipe(grid.verb, grid.settings(cell.settings, 0)) for cell in grid.cells}
    return {cell: resolve_sites(recipe.training.attack_sites, depth) for cell, recipe in recipes.items()}


def test_the_layer_sets_are_those_of_the_question_and_the_organism_has_them_as_fractions():
    llama, organism = sites("llama3_layers", 32), sites("organism_layers", 8)
    assert llama["published"] == ("embedding", 8, 16, 24, 30)
    assert llama["4, 12, 20, 28"] == ("embedding", 4, 12, 20, 28)
    assert llama["2, 10, 18, 26"] == ("embedding", 2, 10, 18, 26)
    assert llama["published without the embedding"] == (8, 16, 24, 30)
    assert len(llama["random four"]) == 32
    assert organism["published"] == ("embedding", 2, 4, 6, 7)
    assert organism["4, 12, 20, 28 of 32"] == ("embedding", 1, 3, 5, 7)
    assert organism["2, 10, 18, 26 of 32"] == ("embedding", 0, 2, 4, 6)
    assert organism["published without the embedding"] == (2, 4, 6, 7)
    assert [organism[f"layer {layer}"] for layer in (2, 4, 6, 7)] == [(2,), (4,), (6,), (7,)]
    assert len(organism["random four"]) == len(organism["gradient's four"]) == 8


def matched(norm: str, length: float, width: int) -> float:
    """Radius of another norm's ball for a random direction of this l2 length (lat.md 2.4)."""
    factors = {"l1": math.sqrt(2 * width / math.pi), "l2": 1.0, "linf": math.sqrt(2 * math.log(width) / width)}
    return length * factors[norm]


@pytest.mark.parametrize(
    ("name", "width", "readings"),
    [("llama3_norms", 4096, {"(i)", "(ii)", "(iii)"}), ("organism_norms", 128, {"(iii)"})],
)
def test_the_radii_of_the_readings(name, width, readings):
    grid = grid_of(FOLDER / f"{name}.yaml")
    seen = set()
    for cell in grid.cells:
        if not cell.name.startswith("("):
            continue
        reading, norm, strength = cell.name.split()
        training = cell_recipe(grid.verb, grid.settings(cell.settings, 0)).training
        expected = {
            "(i)": float(strength),
            "(ii)": matched(norm, 6 * float(strength), width),
            "(iii)": matched(norm, float(strength), width),
        }[reading]
        assert training.attack_radius == pytest.approx(expected, rel=1e-3)
        assert training.attack_norm == norm and training.attack_optimizer == "steepest"
        assert training.attack_radius_unit == ("relative" if reading == "(iii)" else "absolute")
        seen.add((reading, norm, strength))
    assert seen == {
        (reading, norm, strength)
        for reading in readings
        for norm in ("l1", "l2", "linf")
        for strength in ("0.1", "0.5", "1.0")
    }


def test_the_extras_change_one_thing_at_a_time():
    grid = grid_of(FOLDER / "llama3_extras.yaml")
    changed = {cell.name: set(cell.own) for cell in grid.cells}
    assert changed.pop("published") == set()
    assert {name for name, keys in changed.items() if len(keys) > 1} == {
        "SFT in place of KL", "M = 1, equal attacks", "random",
    }  # fmt: skip
    assert set().union(*changed.values()) >= {
        "attack_steps", "attack_positions", "away_coef", "attack_away_coef", "sft_coef", "kl_form",
        "updates_per_attack", "attack_objective", "faithful", "reset_optimizer",
    }  # fmt: skip


def lap_cells(name: str) -> dict:
    """What every cell of a LAP grid trains with."""
    grid = grid_of(FOLDER / f"{name}.yaml")
    return {cell.name: cell_recipe(grid.verb, grid.settings(cell.settings, 0)).training for cell in grid.cells}


def test_epsilon_is_crossed_with_what_makes_the_constraint_bind():
    cells = lap_cells("lap_epsilon")
    crossed = {(t.lap_epsilon, t.lap_alpha, t.lap_steps) for name, t in cells.items() if name.startswith("lap_")}
    assert crossed == {(e, a, t) for e in (0.01, 0.05, 0.1) for a in (2, 20, 200) for t in (8, 32)}
    persisting = [t.lap_epsilon for t in cells.values() if t.lap_lambda_persist == "ema"]
    assert persisting == [0.01, 0.05, 0.1]
    controls = {name for name, t in cells.items() if not t.attacks or t.lap_search == "random"}
    assert controls == {"random", "plain", "plain, equal cost"}


def test_the_layer_scans_are_the_papers_layers_at_one_bound():
    for name, depth, layers in (
        ("lap_layers", 32, [("embedding",), (5,), (11,), (17,), (19,), (23,)]),
        ("organism_lap_layers", 8, [("embedding",), (1,), (2,), (4,), (5,)]),
    ):
        matched = [t for cell, t in lap_cells(name).items() if t.attacks and "unmatched" not in cell]
        assert [resolve_sites(t.lap_layers, depth) for t in matched] == layers
        # All steps together reach the bound at least twice over; the preset counts a step in the hidden states' norm.
        assert {(t.lap_token_cap, t.lap_learning_rate, t.lap_preset) for t in matched} == {
            (matched[0].lap_token_cap, 0.05, "robust")
        }
        assert matched[0].lap_steps * 0.05 >= 2 * matched[0].lap_token_cap


def test_several_layers_have_one_layers_budget():
    cells = lap_cells("lap_several_layers")
    for name in ("one", "two", "four"):
        training = cells[name]
        total = training.lap_token_cap * math.sqrt(len(training.lap_layers))
        assert total == pytest.approx(0.1, rel=1e-3)
    assert cells["four, no budget"].lap_token_cap == 0.1


def test_the_curves_of_figure_5_are_asked_for_in_both_readings():
    cells = lap_cells("lap_fig5").values()
    assert all(t.lap_curves and t.lap_branch == "adv_only" and t.lap_steps == 8 for t in cells)
    assert {(t.lap_preset, t.lap_epsilon) for t in cells} == {
        (preset, epsilon) for preset in ("paper", "paper_rms") for epsilon in (0.01, 0.05, 0.1)
    }


def test_the_grid_for_dialogues_compares_user_turns():
    positions = [t.lap_positions for t in lap_cells("lap_multi_turn").values() if t.attacks]
    assert positions == ["last_user", "all_user", "prompt"]


@functools.cache
def seal_stages(name: str) -> dict:
    """What every cell of a SEAL grid chooses rows and trains with."""
    grid = grid_of(FOLDER / f"{name}.yaml")
    return {cell.name: [stage.recipe() for stage in grid.stages(cell.settings, 0)] for cell in grid.cells}


SEAL_GRIDS = [f"{model}seal_{what}" for model in ("", "organism_") for what in ("functions", "penalty", "safe_size")]


@pytest.mark.parametrize("name", [*SEAL_GRIDS, "organism_seal_keep"])
def test_the_second_stage_of_a_seal_grid_is_plain_sft_on_what_the_first_one_keeps(name):
    for first, second in seal_stages(name).values():
        assert (first.verb, second.verb) == ("seal", "lap-sft") and not second.training.attacks
        assert second.script.dataset_name == "{first}/kept.jsonl"
        assert first.model.model_name_or_path == second.model.model_name_or_path
    methods = {first.training.selection_method for first, _ in seal_stages(name).values()}
    assert {"seal", "random", "none"} <= methods
    of_second = [second.training.to_dict() | {"output_dir": None} for _, second in seal_stages(name).values()]
    assert all(settings == of_second[0] for settings in of_second)
    # On the organism all cells are fine-tuned for as many updates, whatever they keep.
    assert (of_second[0]["max_steps"] > 0) == name.startswith("organism")


@pytest.mark.parametrize("name", ["seal_functions", "organism_seal_functions"])
def test_the_functions_of_the_question_and_the_sigmoid_that_tanh_is(name):
    cells = {cell: stages[0].training for cell, stages in seal_stages(name).items()}
    for function in ("softmax", "sigmoid", "relu", "tanh"):
        assert cells[function].selector_function == function and cells[function].selector_normalized
    first, _ = seal_stages(name)["tanh"]
    rows = first.training.per_device_train_batch_size * first.training.gradient_accumulation_steps
    twin = cells["sigmoid at four times the rate"]
    assert twin.selector_function == "sigmoid" and not cells["sigmoid, raw"].selector_normalized
    assert twin.selector_learning_rate == pytest.approx(4 * cells["tanh"].logits_learning_rate(rows), rel=1e-12)
    assert cells["softmax, adam"].logits_learning_rate(rows) == 4e-3
    assert cells["softmax, exponentiated gradient"].logits_learning_rate(rows) == pytest.approx(0.25 / 3)
    assert {t.selection_method for t in cells.values()} >= {"random", "safe_loss", "loss_gap", "none"}


@pytest.mark.parametrize("name", ["seal_penalty", "organism_seal_penalty"])
def test_the_strengths_of_the_question_with_both_algorithms_and_in_both_readings(name):
    cells = {cell: stages[0].training for cell, stages in seal_stages(name).items()}
    crossed = {(t.penalty_strength, t.penalty_algorithm) for cell, t in cells.items() if "penalty_strength=" in cell}
    assert crossed == {
        (gamma, algorithm)
        for gamma in (0.01, 0.05, 0.1, 0.2, 0.5, 0.9)
        for algorithm in ("auxiliary", "memory_efficient")
    }
    raised = [t for cell, t in cells.items() if cell.startswith("increment")]
    last = [t.schedule.at(2, per_epoch=1, total=3) for t in raised]
    assert last == pytest.approx([0.02, 0.1, 0.2, 0.4]) and all(t.uses_auxiliary for t in raised)
    assert all(t.schedule.at(0, per_epoch=1, total=3) == 0 and t.num_train_epochs == 3 for t in raised)


@pytest.mark.parametrize("name", ["seal_safe_size", "organism_seal_safe_size"])
def test_the_sizes_of_the_upper_level_set(name):
    cells = {cell: stages[0].training for cell, stages in seal_stages(name).items()}
    assert [t.safe_fraction for cell, t in cells.items() if "safe_fraction" in cell] == [0.1, 0.2, 0.5, 1.0]


def test_the_shares_that_are_kept():
    shares = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    cells = {cell: stages[0].training for cell, stages in seal_stages("organism_seal_keep").items()}
    assert [t.keep_fraction for t in cells.values() if t.selection_method == "seal"] == shares
    assert [t.keep_fraction for t in cells.values() if t.selection_method == "random"] == [0.2, 0.5, 0.8]
    # At full size the selector is trained once, by the commands of the header.
    grid = grid_of(FOLDER / "seal_keep.yaml")
    assert grid.then is None and grid.verb == "lap-sft"
    files = [cell.settings["dataset_name"] for cell in grid.cells if cell.name.startswith("keep")]
    assert files == [f"runs/llama3-8b-kept-{share}/kept.jsonl" for share in shares]
    assert f"for keep in {' '.join(map(str, shares))}; do" in (FOLDER / "seal_keep.yaml").read_text(encoding="utf-8")
