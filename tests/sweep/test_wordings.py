"""Questions in several wordings: their keys in a grid, their measures on hand-made answers, and a sweep with them."""

import csv
import json

import pytest
from grid_parts import grid_values, write_grid
from recipe_parts import settings, write_recipe, write_rows

from trl_robust.data import DataError
from trl_robust.recipes import RecipeError
from trl_robust.sweep.evaluate_keys import WordingsKeys
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.picture import marks_of, picture_files
from trl_robust.sweep.planning import make_plan
from trl_robust.sweep.running import run_sweep
from trl_robust.sweep.table import tabulate
from trl_robust.sweep.wordings import AVERAGE, ORIGINAL, WORST, entry_of, scores_by_case
from trl_robust.sweep.writing import csv_text, markdown, terminal_table

OTHERS = ("attack_sites", "attack_radius", "attack_steps", "attack_optimizer", "away_coef", "benign_dataset_name")


def rows(table: dict[str, list[bool | None]]) -> list[dict]:
    """Judged answers, the original wording first; `None` is one that errored."""
    return [
        {"case": case, "wording": number, "status": "errored" if right is None else "scored", "success": right}
        for case, answers in table.items()
        for number, right in enumerate(answers)
    ]


HAND_MADE = {
    "all": [True, True, True],
    "one wrong": [True, False, True],
    "only the original wrong": [False, True, True],
    "one not answered": [True, None, True],
    "original not answered": [None, True, True],
}


def test_worst_case_accuracy_is_the_share_of_questions_right_in_every_wording():
    found = scores_by_case(rows(HAND_MADE))
    assert found[WORST] == {"all": 1, "one wrong": 0, "only the original wrong": 0, "one not answered": 1}
    assert found[ORIGINAL] == {"all": 1, "one wrong": 1, "only the original wrong": 0, "one not answered": 1}
    assert found[AVERAGE] == pytest.approx(
        {"all": 1, "one wrong": 2 / 3, "only the original wrong": 2 / 3, "one not answered": 1}
    )
    entry = entry_of(rows(HAND_MADE))
    assert (entry["worst"], entry["original"], entry["average"]) == (0.5, 0.75, pytest.approx(10 / 12))
    assert (entry["n_cases"], entry["n_excluded"], entry["n_missing"]) == (4, 1, 2)


def cases(place, name="cases.jsonl", **without):
    return write_rows(
        place / name,
        [
            {
                "instruction": f"w{i} w{i + 1}",
                "paraphrases": [f"w{i + 1} w{i}", f"w{i}"],
                "answer": f"w{i}",
                "index": i,
            }
            | without
            for i in range(3)
        ],
    )


@pytest.fixture(scope="module")
def lap_place(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordings")
    own = settings(place, **dict.fromkeys(OTHERS), dataset_name=str(place / "benign.jsonl"))
    write_recipe(
        folder / "lap.yaml", {"verb": "lap-sft", **own, "lap_layers": [1], "lap_steps": 2, "lap_curves": True}
    )
    cases(folder)
    return folder


def lap_grid(lap_place, place, **changes):
    evaluate = {"wordings": str(lap_place / "cases.jsonl"), "max_new_tokens": 3}
    cells = {"usual": {"lap_adv_prob": 1}, "all updates": {"lap_branch": "adv_only"}, "plain": {"lap_steps": 0}}
    return grid_values(
        place, **({"recipe": str(lap_place / "lap.yaml"), "cells": cells, "evaluate": evaluate} | changes)
    )


def test_without_attacks_a_grid_needs_neither_requests_nor_a_judge_and_tells_what_it_measures(lap_place, place):
    grid = load_grid(write_grid(lap_place / "grid.yaml", lap_grid(lap_place, place)))
    assert grid.evaluation.attacks == {} and grid.evaluation.wordings == WordingsKeys(str(lap_place / "cases.jsonl"))
    assert str(lap_place / "cases.jsonl") in grid.evaluation.files()
    assert "wordings" in grid.evaluation.identity()
    assert make_plan(grid).same == {
        "all updates": ("usual", "every update is made under perturbation; no branch is drawn")
    }


def test_grids_without_wordings_keep_the_fingerprints_of_their_finished_runs(place, tmp_path):
    grid = load_grid(write_grid(tmp_path / "grid.yaml", grid_values(place)))
    assert "wordings" not in grid.evaluation.identity()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wordings": {"path": "a.jsonl", "prompt_column": "b"}}, "`prompt_column` is not a key there"),
        ({"wordings": "a.jsonl", "attacks": {"direct": {}}}, "`requests` is missing"),
        ({"attacks": {}}, "`attacks` is empty"),
    ],
)
def test_what_is_wrong_is_said(lap_place, place, tmp_path, changes, words):
    values = lap_grid(lap_place, place, evaluate=changes)
    with pytest.raises(RecipeError) as error:
        load_grid(write_grid(tmp_path / "grid.yaml", values))
    assert any(words in fault for fault in error.value.faults)


def test_with_an_organism_wordings_and_utility_are_files_of_its_own(lap_place, place, tmp_path):
    values = lap_grid(lap_place, place, organism={}, evaluate={"wordings": "mine.jsonl", "utility": "mine.jsonl"})
    with pytest.raises(RecipeError) as error:
        load_grid(write_grid(tmp_path / "grid.yaml", values))
    for key in ("wordings", "utility"):
        assert any(f"`{key}` is mine.jsonl; with `organism` it is one of the" in fault for fault in error.value.faults)


def test_questions_without_an_answer_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"no `answer` for 3 of 3 questions.*trl-robust evaluate --suite prompts"):
        WordingsKeys(str(cases(tmp_path, answer=None))).load()
    assert len(WordingsKeys(str(cases(tmp_path)), max_rows=2).load()) == 2


def test_a_sweep_of_lap_measures_wordings_and_keeps_what_tells_of_the_search(
    lap_place, place, tmp_path, in_this_process
):
    values = lap_grid(lap_place, place, output_dir=str(tmp_path / "out"))
    grid = load_grid(write_grid(tmp_path / "grid.yaml", values))
    table = run_sweep(grid, jobs=1)
    assert table["failed"] == {} and table["wordings"] and table["attacks"] == []
    folder = grid.folder("usual", 0)
    assert len((folder / "wordings.jsonl").read_text().splitlines()) == 9
    assert len((folder / "lap_curves.jsonl").read_text().splitlines()) == 2
    assert not (grid.folder("plain", 0) / "lap_curves.jsonl").exists()
    entry = json.loads((folder / "results.json").read_text())["models"][0]
    assert entry["wordings"]["n_cases"] == 3 and entry["attacks"] == []
    cells = {cell["name"]: cell for cell in table["cells"]}
    (run,) = cells["usual"]["runs"]
    assert set(run["search"]) == {"relative norm", "loss change", "feasible", "lambda"}
    assert 0 < run["search"]["relative norm"] < 1 and cells["plain"]["runs"][0]["search"] == {}
    assert "| cell | seeds | worst-case accuracy | average accuracy | original wording | relative norm |" in markdown(
        table
    )


@pytest.fixture
def swept(lap_place, place, tmp_path):
    """Two cells whose answers are made by hand."""
    values = lap_grid(lap_place, place, output_dir=str(tmp_path / "out"))
    del values["cells"]["all updates"]
    grid = load_grid(write_grid(tmp_path / "grid.yaml", values))
    plan = make_plan(grid)
    answers = {
        "before training": [[0, 0, 0]] * 3,
        "usual": [[1, 1, 1], [1, 1, 1], [1, 0, 1]],
        "plain": [[1, 1, 1], [1, 0, 0], [1, 0, 1]],
    }
    for run in plan.runs:
        run.folder.mkdir(parents=True)
        judged = rows({str(i): [bool(right) for right in case] for i, case in enumerate(answers[run.name])})
        write_rows(run.folder / "wordings.jsonl", judged)
        for name in ("generations.jsonl", "harmless.jsonl"):
            (run.folder / name).write_text("")
        entry = {"name": run.name, "attacks": [], "utility": {}, "over_refusal": {}, "wordings": entry_of(judged)}
        (run.folder / "results.json").write_text(json.dumps({"models": [entry]}))
        done = {"fingerprint": "", "seconds": {"training": 1, "measuring": 1}, "settings": run.identity}
        (run.folder / "cell.json").write_text(json.dumps(done))
    return tabulate(grid, plan, {})


def test_the_table_leads_with_the_worst_case_and_its_difference_to_the_baseline(swept):
    cells = {cell["name"]: cell for cell in swept["cells"]}
    assert cells["usual"]["figures"][WORST]["value"] == pytest.approx(2 / 3)
    assert cells["plain"]["figures"][AVERAGE]["value"] == pytest.approx(6 / 9)
    assert cells["plain"]["differences"][WORST]["value"] == pytest.approx(-1 / 3)
    page = markdown(swept)
    assert "| plain | -0.33 [" in page and "attack" not in page.replace("harmful", "")
    assert "Questions answered rightly" not in page and "Worst-case accuracy: questions answered rightly" in page
    columns = [column.header for column in terminal_table(swept).columns]
    assert columns == ["cell", "seeds", WORST, "difference", AVERAGE, ORIGINAL]
    lines = list(csv.DictReader(csv_text(swept).splitlines()))
    assert [(line["cell"], float(line[WORST])) for line in lines] == [
        ("before training", 0.0), ("usual", pytest.approx(2 / 3)), ("plain", pytest.approx(1 / 3)),
    ]  # fmt: skip


def test_the_picture_sets_failing_in_some_wording_against_average_accuracy(swept):
    places = {mark.name: (mark.success[0], mark.worth[0]) for mark in marks_of(swept)}
    assert places["usual"] == pytest.approx((1 / 3, 8 / 9)) and places["plain"] == pytest.approx((2 / 3, 6 / 9))
    text = picture_files(swept)["pareto.svg"].decode()
    assert "questions answered wrongly in some wording (lower is better)" in text
