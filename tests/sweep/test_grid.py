"""What a grid's file may say, what its cells are, and that everything wrong with it is said at once."""

import pytest
from grid_parts import grid_values, write_grid
from recipe_parts import settings, write_recipe

from trl_robust.cli import main
from trl_robust.recipes import RecipeError
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.stages import cell_recipe


@pytest.fixture
def grid(place, tmp_path):
    """Loads a grid with changes."""

    def load(**changes):
        return load_grid(write_grid(tmp_path / "grid.yaml", grid_values(place, **changes)))

    return load


@pytest.fixture
def faults(grid):
    """The faults of a grid with changes."""

    def found(**changes):
        with pytest.raises(RecipeError) as error:
            grid(**changes)
        return error.value.faults

    return found


class TestExpansion:
    def test_axes_multiply_and_single_cells_stand_beside_the_product(self, grid):
        found = grid(
            axes={"attack_norm": ["l1", "l2"], "attack_steps": [1, 2, 3]},
            cells={"usual": {}, "embedding only": {"attack_sites": ["embedding"]}},
        )
        names = [cell.name for cell in found.cells]
        assert names[:3] == ["attack_norm=l1, attack_steps=1", "attack_norm=l1, attack_steps=2", names[2]]
        assert len(names) == 2 * 3 + 2 and names[-2:] == ["usual", "embedding only"]
        assert found.cells[4].own == {"attack_norm": "l2", "attack_steps": 2}

    def test_paired_values_change_together_and_never_mix(self, grid):
        balls = {
            "weak": {"attack_norm": "l1", "attack_radius": 9},
            "strong": {"attack_norm": "l2", "attack_radius": 1},
        }
        found = grid(axes={"attack_steps": [1, 2]}, paired={"ball": balls}, cells={}, baseline="attack_steps=1, weak")
        assert [cell.name for cell in found.cells] == [
            "attack_steps=1, weak", "attack_steps=1, strong", "attack_steps=2, weak", "attack_steps=2, strong",
        ]  # fmt: skip
        assert {(cell.own["attack_norm"], cell.own["attack_radius"]) for cell in found.cells} == {("l1", 9), ("l2", 1)}

    def test_a_cell_beats_set_and_set_beats_the_base_recipe(self, grid):
        found = grid(set={"attack_steps": 7, "attack_radius": 0.25}, cells={"usual": {}, "own": {"attack_steps": 9}})
        usual, own = (cell_recipe(found.verb, found.settings(cell.settings, 3)).training for cell in found.cells)
        assert (usual.attack_steps, own.attack_steps) == (7, 9)
        assert usual.attack_radius == own.attack_radius == 0.25
        assert usual.away_coef == 0.5 and usual.seed == 3  # of the base recipe, and of the sweep

    def test_whatever_can_stand_in_a_recipe_can_stand_in_a_cell(self, grid):
        own = {"trained_layers": [], "attack_sites": [-1], "chat_template_path": None, "lr_scheduler_kwargs": {"a": 1}}
        found = grid(cells={"usual": {}, "own": own})
        training = cell_recipe(found.verb, found.settings(found.cells[1].settings, 0)).training
        assert training.attack_sites == ["-1"] and training.lr_scheduler_kwargs == {"a": 1}

    def test_without_seeds_it_is_the_seed_of_the_base_recipe(self, grid, place, tmp_path):
        assert grid(seeds=None).seeds == (42,)
        write_recipe(tmp_path / "seeded.yaml", {**settings(place), "seed": 5})
        assert grid(seeds=None, recipe=str(tmp_path / "seeded.yaml")).seeds == (5,)

    def test_the_base_recipe_is_found_beside_the_grid_and_the_command_line_beats_the_file(self, place, tmp_path):
        write_recipe(tmp_path / "base.yaml", {**settings(place), "verb": "lat-sft"})
        path = write_grid(tmp_path / "grid.yaml", grid_values(place, recipe="base.yaml"))
        found = load_grid(path, output_dir=str(tmp_path / "else"), seeds=[3, 4])
        assert (found.output_dir, found.seeds) == (tmp_path / "else", (3, 4))

    def test_an_organism_gives_every_seed_its_model_and_its_files(self, grid, place, tmp_path):
        base = {
            **settings(place),
            "dataset_name": "x/harmful_preferences.jsonl",
            "benign_dataset_name": "benign.jsonl",
        }
        write_recipe(tmp_path / "base.yaml", base)
        found = grid(recipe=str(tmp_path / "base.yaml"), organism={"num_layers": 8}, evaluate=None)
        own = found.settings(found.cells[0].settings, 2)
        folder = found.organism_folder(2)
        assert own["model_name_or_path"] == str(folder / "model") and folder.name == "seed-2"
        assert own["dataset_name"] == str(folder / "data" / "harmful_preferences.jsonl")
        assert found.organism.num_layers == 8 and "finetune" in found.evaluation.attacks


class TestStrictness:
    def test_all_faults_are_said_at_once(self, faults):
        found = faults(
            seedz=[1],
            seeds=[1, 1],
            baseline="usaul",
            axes={"attack_norm": []},
            cells={"usual": {"attack_raduis": 1}, "other": {"attack_norm": "l3"}},
            evaluate={"judge": "oracle", "attacks": {"prefil": {}}},
        )
        text = "\n".join(found)
        for words in (
            "is not a key; did you mean `seeds`?",
            "`seeds` names a seed twice",
            "`baseline` is 'usaul', which is no cell; did you mean `usual`?",
            "`axes`: `attack_norm` is []",
            "Cell 'usual': `attack_raduis` is not a key; did you mean `attack_radius`?",
            "Cell 'other': `attack_norm` is 'l3'; it must be one of l1, l2, linf",
            "`judge` (`evaluate`) is 'oracle'; 'exact' or 'refusal_prefix' is needed",
            "`evaluate`: `prefil` is no attack; did you mean `prefill`?",
            "`evaluate`: `requests` is missing",
        ):
            assert words in text
        assert len(found) == 10  # and that `judge` is missing, since what is given is none

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"verb": "lat-sft"}, "`verb` is lat-sft; a grid's is `sweep`"),
            ({"recipe": None}, "`recipe` is missing"),
            ({"recipe": "nowhere.yaml"}, "There is no recipe at"),
            ({"output_dir": None}, "`output_dir` is missing"),
            ({"baseline": None}, "`baseline` is missing"),
            ({"cells": {}}, "The grid has no cell"),
            ({"axes": {"attack_norm": "l1"}}, "`axes`: `attack_norm` is 'l1'; an axis is a list"),
            ({"axes": {"attack_steps": [1, 1]}}, "has a value twice"),
            ({"paired": {"ball": {}}}, "`paired`: `ball` is {}"),
            ({"paired": {"ball": {"a": {"attack_steps": 1}, "b": {}}}}, "set different keys"),
            (
                {"axes": {"attack_steps": [1]}, "paired": {"b": {"a": {"attack_steps": 2}}}},
                "`attack_steps` is set by two axes",
            ),
            ({"cells": {"usual": 3}}, "`cells`: `usual` is 3; a cell is a mapping"),
            ({"cells": {"usual": {}, "a b": {}, "A-b": {}}}, "would share the folder `a-b`"),
            ({"cells": {"usual": {}, "Before training": {}}}, "would share the folder `before-training`"),
            ({"cells": {"usual": {}, "?": {}}}, "needs a name with letters or digits"),
            ({"cells": {"usual": {"output_dir": "x"}}}, "`output_dir` belongs to the sweep"),
            ({"set": {"seed": 3}}, "`seed` belongs to the sweep"),
            ({"set": {"num_processes": 2}}, "cells run in one process each"),
            ({"cells": {"usual": {"env": {"A": "1"}}}}, "`env` is the same for all cells"),
            ({"set": {"attack_stpes": 3}}, "Every cell: `attack_stpes` is not a key"),
            ({"seeds": [-1]}, "a seed is from 0"),
            ({"keep_models": "perhaps"}, "`keep_models` (line"),
            ({"organism": {"num_layer": 8}, "evaluate": {}}, "did you mean `num_layers`?"),
            ({"organism": {"num_layers": 1}, "evaluate": {}}, "`num_layers` is 1"),
            ({"organism": {}, "evaluate": {}}, "with `organism` it is one of the organism's files"),
            ({"organism": {}, "set": {"model_name_or_path": "gpt2"}}, "it is its `base` or its `model`"),
            ({"organism": {}, "evaluate": {"judge": "exact"}}, "`judge`: the organism has its own"),
            ({"evaluate": {"attacks": {}}}, "`attacks` is empty"),
            ({"evaluate": {"attacks": {"latent": {"radios": 1}}}}, "has no setting 'radios'"),
            ({"evaluate": {"attacks": {"latent": {"radius": "far"}}}}, "a number is needed"),
            ({"evaluate": {"attacks": {"latent": {"norm": "l3"}}}}, "`norm` of the attack `latent` is 'l3'"),
            ({"evaluate": {"attacks": {"finetune": {}}}}, "`finetune` is missing"),
            ({"evaluate": {"mean_over": ["latent"]}}, "`mean_over` names `latent`"),
            ({"evaluate": {"requests": {"path": "a.jsonl", "colum": "b"}}}, "`colum` is not a key there"),
            ({"evaluate": {"lm_eval": {"task": ["mmlu"]}}}, "`task` is not a key there; did you mean `tasks`?"),
        ],
    )
    def test_a_fault_is_named(self, faults, changes, words):
        assert any(words in fault for fault in faults(**changes))

    def test_a_base_recipe_of_no_training_verb_is_refused(self, faults, place, tmp_path):
        write_recipe(tmp_path / "base.yaml", {**settings(place), "verb": "evaluate"})
        assert "is for `evaluate`; a cell trains with one of lat-sft" in faults(recipe=str(tmp_path / "base.yaml"))[0]

    def test_validate_knows_grids(self, place, tmp_path, capsys):
        path = write_grid(tmp_path / "grid.yaml", grid_values(place))
        assert main(["validate", str(path)]) == 0
        assert f"OK {path} (sweep): 2 cells of lat-sft, 1 seeds" in capsys.readouterr().out
        write_grid(path, grid_values(place, axes={"attack_nrom": ["l1"]}))
        assert main(["validate", str(path)]) == 1
        assert "did you mean `attack_norm`?" in capsys.readouterr().err
