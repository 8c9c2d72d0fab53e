"""Cells of two trainings: the second takes what the first has left, and a finished first one is not run again."""

import json
import shutil

import pytest
from grid_parts import grid_values, write_grid
from recipe_parts import settings, write_recipe, write_rows
from tiny import completion_data

from trl_robust.cli import main
from trl_robust.recipes import RecipeError, recipes_folder
from trl_robust.sweep import running, work
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.planning import make_plan, refuse_changed
from trl_robust.sweep.stages import FIRST, Stage, before_the_first, selection_of, with_organism
from trl_robust.sweep.work import DONE

KEPT = f"{FIRST}/kept.jsonl"
ATTACK = ("attack_sites", "attack_radius", "attack_steps", "attack_optimizer", "away_coef", "benign_dataset_name")


def plain(place, **changes) -> dict:
    """Plain SFT on the rows of `rows.jsonl`."""
    values = settings(place, dataset_name=str(place / "rows.jsonl"), **dict.fromkeys(ATTACK))
    return values | {"verb": "lap-sft", "lap_branch": "sft_only"} | changes


def choosing(place, **changes) -> dict:
    values = {key: value for key, value in plain(place).items() if key != "lap_branch"}
    values |= {
        "verb": "seal",
        "safe_dataset_name": str(place / "benign.jsonl"),
        "penalty_algorithm": "memory_efficient",
    }
    return values | {"num_train_epochs": 1, "max_steps": -1, "label_column": "harmful", "keep_fraction": 0.5} | changes


@pytest.fixture(scope="module")
def rows(place):
    """Half of the rows are said to be harmful."""
    data = [row | {"harmful": number % 2 == 0} for number, row in enumerate(completion_data(16, 7))]
    write_rows(place / "rows.jsonl", data)
    return place


@pytest.fixture
def values(rows, tmp_path):
    """Keys of a grid of two stages: a choice at random in place of a selector, which trains nothing, then SFT."""
    write_recipe(tmp_path / "first.yaml", choosing(rows, selection_method="random"))
    write_recipe(tmp_path / "second.yaml", plain(rows, dataset_name="kept.jsonl"))

    def found(**changes):
        return grid_values(rows, **{
            "recipe": "first.yaml",
            "output_dir": str(tmp_path / "out"),
            "then": {"recipe": "second.yaml", "set": {"dataset_name": KEPT}},
            "cells": {"half": {}, "faster": {"then.learning_rate": 0.1}},
            "baseline": "half",
        } | changes)  # fmt: skip

    return found


@pytest.fixture
def grid(values, tmp_path):
    return lambda **changes: load_grid(write_grid(tmp_path / "grid.yaml", values(**changes)))


@pytest.fixture
def run_of(grid):
    """The work of a cell."""
    return lambda name="half", **changes: next(run for run in make_plan(grid(**changes)).runs if run.name == name)


class TestReading:
    def test_keys_with_then_before_them_are_those_of_the_second_stage(self, grid, rows):
        found = grid(set={"then.max_steps": 5, "penalty_strength": 0.25}, seeds=[3])
        first, second = found.stages(found.cells[1].settings, 3)
        assert (first.verb, second.verb) == ("seal", "lap-sft")
        assert (first.settings["penalty_strength"], first.settings["max_steps"]) == (0.25, -1)
        assert second.settings["learning_rate"] == 0.1 and first.settings["learning_rate"] == "1e-3"
        assert second.settings["max_steps"] == 5 and "penalty_strength" not in second.settings
        assert first.settings["seed"] == second.settings["seed"] == 3
        assert second.settings["dataset_name"] == KEPT and first.settings == found.settings(found.cells[1].settings, 3)

    def test_axes_may_be_of_either_stage(self, grid):
        axes = {"keep_fraction": [0.2, 0.8], "then.max_steps": [1, 2]}
        found = grid(axes=axes, cells={}, baseline="keep_fraction=0.2, then.max_steps=1")
        pairs = [[stage.recipe().training for stage in found.stages(cell.settings, 0)] for cell in found.cells]
        assert [(first.keep_fraction, second.max_steps) for first, second in pairs] == [
            (0.2, 1), (0.2, 2), (0.8, 1), (0.8, 2),
        ]  # fmt: skip

    def test_the_model_before_training_is_the_one_that_the_last_stage_begins_with(self, grid, rows):
        assert grid(set={"model_name_or_path": "small"}).before(0).settings["model_name_or_path"] == str(
            rows / "model"
        )
        gone_on = {"recipe": "second.yaml", "set": {"model_name_or_path": FIRST}}
        assert grid(recipe="second.yaml", then=gone_on).before(0).settings["model_name_or_path"] == str(rows / "model")

    def test_a_folder_is_put_wherever_it_is_named(self, tmp_path):
        given = {"dataset_name": KEPT, "datasets": [{"path": KEPT, "columns": ["prompt"]}], "max_steps": 3}
        found = Stage("lap-sft", given).after(tmp_path).settings
        kept = str(tmp_path / "kept.jsonl")
        assert found == {"dataset_name": kept, "datasets": [{"path": kept, "columns": ["prompt"]}], "max_steps": 3}

    def test_an_organisms_files_do_not_take_the_place_of_what_the_first_stage_leaves(self, tmp_path):
        given = {"dataset_name": KEPT, "safe_dataset_name": "x/benign.jsonl", "model_name_or_path": FIRST}
        found = with_organism(given, tmp_path)
        assert found == given | {"safe_dataset_name": str(tmp_path / "data" / "benign.jsonl")}
        assert with_organism({}, tmp_path)["model_name_or_path"] == str(tmp_path / "model")

    def test_all_faults_are_told_at_once(self, grid):
        with pytest.raises(RecipeError) as error:
            grid(
                set={"keep_fractoin": 1, "dataset_name": KEPT},
                then={
                    "recipe": "second.yaml",
                    "set": {"dataset_name": "x.jsonl", "seed": 3, "lap_stepz": 2},
                    "sett": 1,
                },
                cells={"half": {}, "other": {"then.dataset_name": KEPT, "then.env": {"A": "1"}}},
            )
        text = "\n".join(error.value.faults)
        for words in (
            "Every cell: `keep_fractoin`",
            "`dataset_name` names `{first}`, which only the second stage",
            "`then`: `sett`",
            "Every cell: `then`: `lap_stepz`",
            "Every cell: `then`: `seed` belongs to the sweep",
            "Cell 'half': `then`: no setting names `{first}`",
            "Cell 'other': `then`: `env` is the same for all cells",
        ):
            assert words in text

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"then": None, "cells": {"half": {}}}, "which leaves rows and no model to measure. Give `then`"),
            ({"then": None, "recipe": "second.yaml"}, "`then.learning_rate` is for a second stage"),
            ({"then": {"recipe": "first.yaml"}}, "`then`: `recipe` "),
            ({"then": {}}, "`then`: `recipe` is missing: name the recipe of the second stage"),
            ({"then": {"recipe": "nowhere.yaml"}}, "nowhere.yaml"),
        ],
    )
    def test_a_second_stage_that_is_missing_or_none_is_refused(self, grid, changes, words):
        with pytest.raises(RecipeError) as error:
            grid(**changes)
        assert words in "\n".join(error.value.faults)

    def test_an_organisms_second_stage_trains_on_its_files_alone(self, grid):
        then = {"recipe": "second.yaml", "set": {"dataset_name": "elsewhere.jsonl", "model_name_or_path": FIRST}}
        with pytest.raises(RecipeError) as error:
            grid(organism={}, evaluate={}, then=then, set={"dataset_name": "benign.jsonl"})
        (fault,) = error.value.faults
        assert fault.startswith("Every cell: `then`: `dataset_name` is elsewhere.jsonl; with `organism`")


class TestBeforehand:
    def test_what_waits_for_the_first_stage_is_checked_with_what_the_first_stage_has(self):
        first = Stage("seal", {"dataset_name": "rows.jsonl", "model_name_or_path": "small", "drop_long": True})
        second = Stage("lap-sft", {"dataset_name": KEPT, "dataset_train_split": "x", "model_name_or_path": "large"})
        assert before_the_first([first, second]) == [
            first, Stage("lap-sft", {"dataset_name": "rows.jsonl", "model_name_or_path": "large", "drop_long": True}),
        ]  # fmt: skip
        mixture = Stage("seal", {"datasets": [{"path": "rows.jsonl"}]})
        third = Stage("lap-sft", {"dataset_name": KEPT, "model_name_or_path": FIRST})
        assert before_the_first([mixture, third])[1].settings == {"datasets": [{"path": "rows.jsonl"}]}
        assert before_the_first([first]) == [first]

    def test_a_second_stage_that_cannot_run_stops_before_the_first_has_run(self, values, tmp_path, monkeypatch):
        monkeypatch.setattr(running, "run_all", lambda *_, **__: pytest.fail("ran"))
        path = write_grid(tmp_path / "grid.yaml", values(set={"then.model_name_or_path": str(tmp_path / "no-model")}))
        with pytest.raises(RecipeError, match="no-model"):
            running.run_sweep(load_grid(path))

    def test_cells_that_differ_in_either_stage_alone_are_run_and_others_once(self, grid):
        cells = {
            "half": {},
            "longer": {"then.max_steps": 3},
            "other rows": {"keep_fraction": 0.25},
            "unread by the first": {"penalty_strength": 0.125},  # a choice at random has none
            "unread by the second": {"then.lap_epsilon": 0.5},
            "unread by both": {"penalty_strength": 0.125, "then.lap_epsilon": 0.5},
        }
        same = make_plan(grid(cells=cells)).same
        assert {name: other for name, (other, _) in same.items()} == dict.fromkeys(list(cells)[3:], "half")
        assert same["unread by the first"][1] == "`random` trains no model"
        assert same["unread by the second"][1] == "nothing is perturbed: the branch is sft_only"
        assert same["unread by both"][1] == f"{same['unread by the first'][1]}; {same['unread by the second'][1]}"

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"selection_method": "none"}, {"selection_method": "none", "keep_fraction": 0.2}),
            ({"selection_method": "random"}, {"selection_method": "random", "safe_dataset_name": "other.jsonl"}),
            ({"selection_method": "safe_loss"}, {"selection_method": "safe_loss", "penalty_strength": 0.1}),
            ({"selection_method": "loss_gap"}, {"selection_method": "loss_gap", "selector_function": "tanh"}),
            ({"selection_method": "dsir"}, {"selection_method": "dsir", "safe_fraction": 0.5}),
            ({"selection_method": "seal"}, {"selection_method": "seal", "selector_normalized": False}),  # softmax
            ({"selection_method": "seal"}, {"selection_method": "seal", "penalty_max": 0.75}),
        ],
    )
    def test_what_a_way_to_choose_does_not_read_makes_no_difference(self, grid, one, other):
        assert "other" in make_plan(grid(cells={"half": one, "other": other})).same

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"selection_method": "random"}, {"selection_method": "random", "keep_fraction": 0.2}),
            ({"selection_method": "dsir"}, {"selection_method": "dsir", "safe_dataset_name": "other.jsonl"}),
            ({"selection_method": "safe_loss"}, {"selection_method": "safe_loss", "safe_fraction": 0.5}),
            ({"selection_method": "seal"}, {"selection_method": "seal", "penalty_max": 0.25}),
            ({"selection_method": "seal", "penalty_increment": 0.5},
             {"selection_method": "seal", "penalty_increment": 0.5, "penalty_max": 0.75}),
            ({"selection_method": "seal", "selector_function": "relu"},
             {"selection_method": "seal", "selector_function": "relu", "selector_normalized": False}),
            ({"selection_method": "seal", "selector_function": "tanh"},
             {"selection_method": "seal", "selector_function": "sigmoid"}),
            ({"selection_method": "none"}, {"selection_method": "safe_instr"}),
        ],
    )  # fmt: skip
    def test_what_a_way_to_choose_reads_makes_one(self, grid, one, other):
        assert make_plan(grid(cells={"half": one, "other": other})).same == {}


class TestRunning:
    def test_the_second_stage_trains_on_the_rows_that_the_first_one_kept(self, run_of, rows):
        run = run_of(keep_models=True)
        run.run(print)
        kept = (run.folder / "first" / "kept.jsonl").read_text().splitlines()
        everything = (rows / "rows.jsonl").read_text().splitlines()
        assert len(kept) == 8 and {json.loads(line)["prompt"] for line in kept} < {
            json.loads(line)["prompt"] for line in everything
        }
        trained = json.loads((run.folder / "run.json").read_text())
        assert trained["verb"] == "lap-sft" and trained["datasets"]["train"]["rows"] == 8
        assert str(run.folder / "first" / "kept.jsonl") in (run.folder / "recipe.yaml").read_text()
        labels = json.loads((run.folder / "first" / "selection.json").read_text())["labels"]
        assert selection_of(run.folder / "first") == {
            "rows": 8, "selector AUROC": labels["auroc"], "harmful rows kept": labels["kept_labelled_share"],
        }  # fmt: skip
        harmful = sum(json.loads(line)["harmful"] for line in kept)
        assert labels["kept_labelled_share"] == harmful / 8

    def test_a_finished_first_stage_is_not_run_again(self, run_of, monkeypatch):
        run = run_of(keep_models=True)
        run.run(print)
        whole = (run.folder / "generations.jsonl").read_text()
        (run.folder / DONE).unlink()
        shutil.rmtree(run.folder / "model")
        with monkeypatch.context() as patch:
            patch.setattr(work, "select", lambda *_, **__: pytest.fail("chose again"))
            run.run(print)
        assert (run.folder / "generations.jsonl").read_text() == whole

        # Nor where the second stage has changed, whose model is then of no use.
        (run.folder / DONE).unlink()
        with monkeypatch.context() as patch:
            patch.setattr(work, "select", lambda *_, **__: pytest.fail("chose again"))
            run_of(keep_models=True, set={"then.learning_rate": 0.5}).run(print)
        assert "learning_rate: 0.5" in (run.folder / "recipe.yaml").read_text()

    def test_a_first_stage_that_is_run_again_is_followed_by_the_second(self, run_of, monkeypatch):
        run = run_of(keep_models=True)
        run.run(print)
        (run.folder / DONE).unlink()
        (run.folder / "first" / "run.json").unlink()  # as if it had been cut short
        trained = []
        train = work.train
        monkeypatch.setattr(work, "train", lambda recipe, **more: trained.append(recipe) or train(recipe, **more))
        run.run(print)
        assert len(trained) == 1

        (run.folder / DONE).unlink()
        run_of(keep_models=True, set={"keep_fraction": 0.25}).run(print)
        assert (
            len(trained) == 2 and json.loads((run.folder / "run.json").read_text())["datasets"]["train"]["rows"] == 4
        )

    def test_settings_of_the_first_stage_that_changed_are_refused(self, run_of, grid):
        run_of().run(print)
        refuse_changed(make_plan(grid()))
        with pytest.raises(RecipeError, match=r"keep_fraction: 0\.5 -> 0\.75"):
            refuse_changed(make_plan(grid(set={"keep_fraction": 0.75})))
        with pytest.raises(RecipeError, match=r"max_steps: 2 -> 3"):
            refuse_changed(make_plan(grid(set={"then.max_steps": 3})))

    def test_of_a_trained_selector_the_selection_stays_and_the_weights_do_not(self, run_of, tmp_path, rows):
        write_recipe(tmp_path / "first.yaml", choosing(rows, save_strategy="steps", save_steps=4))
        run = run_of()
        run.run(print)
        left = {path.name for path in (run.folder / "first").iterdir()}
        assert {"selector.safetensors", "selector.json", "kept.jsonl", "selection.json", "run.json"} <= left
        assert not any(name.startswith("checkpoint") for name in left) and not (run.folder / "model").exists()
        assert [path.name for path in run.folder.rglob("*.safetensors")] == ["selector.safetensors"]
        assert not list(run.folder.rglob("*.bin"))

    def test_a_model_is_trained_further(self, run_of, values, rows, monkeypatch):
        """Two stages of which the first is no choice of rows."""
        then = {
            "recipe": "second.yaml",
            "set": {"dataset_name": str(rows / "rows.jsonl"), "model_name_or_path": FIRST},
        }
        run = run_of(
            recipe="second.yaml", then=then, cells={"half": {}}, set={"dataset_name": str(rows / "rows.jsonl")}
        )
        loaded = []
        load = work.Subject.load
        monkeypatch.setattr(work.Subject, "load", lambda name, **more: loaded.append(name) or load(name, **more))
        run.run(print)
        assert loaded == [run.folder / "model"]
        assert json.loads((run.folder / "run.json").read_text())["model"] == str(run.folder / "first")
        assert (run.folder / "first" / "recipe.yaml").is_file()
        assert not list((run.folder / "first").rglob("*.safetensors"))


def test_the_table_shows_what_was_chosen_beside_what_became_of_the_model(values, tmp_path, in_this_process):
    cells = {"half": {}, "all": {"selection_method": "none"}}
    path = write_grid(tmp_path / "grid.yaml", values(cells=cells, seeds=[0, 1]))
    assert main(["sweep", "--config", str(path), "--jobs", "1"]) == 0
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert table["then"] == {"verb": "lap-sft", "recipe": str(tmp_path / "second.yaml")}
    before, half, everything = table["cells"]
    assert half["figures"]["harmful rows kept"]["seeds"] == 2
    assert half["figures"]["mean success"]["value"] is not None
    kept = [run["selection"]["harmful rows kept"] for run in half["runs"]]
    assert half["figures"]["harmful rows kept"]["value"] == sum(kept) / 2
    assert everything["figures"]["harmful rows kept"]["value"] == 1
    assert everything["differences"]["harmful rows kept"]["value"] == 1 - sum(kept) / 2
    assert [run["selection"]["rows"] for run in everything["runs"]] == [16, 16]
    assert "harmful rows kept" not in before["figures"]
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert f"`seal` on `{tmp_path / 'first.yaml'}`, then `lap-sft` on `{tmp_path / 'second.yaml'}`" in page
    assert "| selector AUROC | harmful rows kept |" in page and "relative norm" not in page
    header, *lines = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert "selector AUROC,harmful rows kept,rows kept" in header
    assert len(lines) == 1 + 2 * 2 and all(len(line.split(",")) == len(header.split(",")) for line in lines[:1])


def test_the_grid_that_the_page_on_sweeps_shows_is_read(tmp_path):
    page = (recipes_folder().parent / "docs" / "sweep.md").read_text(encoding="utf-8")
    (shown,) = [
        block.partition("```")[0] for block in page.split("```yaml\n")[1:] if "then:" in block.partition("```")[0]
    ]
    path = tmp_path / "grid.yaml"
    path.write_text(shown.replace("../seal/", f"{recipes_folder()}/seal/"), encoding="utf-8")
    grid = load_grid(path)
    assert (grid.verb, grid.then.verb, len(grid.cells)) == ("seal", "lap-sft", 7)
    first, second = grid.stages(grid.cells[1].settings, 0)
    assert (first.settings["keep_fraction"], second.settings["learning_rate"]) == (0.2, 1e-3)
