"""The table, its files and its picture, from runs written by hand."""

import csv
import json

import pytest
from grid_parts import grid_values, write_grid

from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.picture import Mark, marks_of, pareto_front, picture_files
from trl_robust.sweep.planning import make_plan
from trl_robust.sweep.table import tabulate
from trl_robust.sweep.writing import csv_text, markdown, terminal_table, write_all


def write_run(run, success: dict[str, list[int]], complied: list[int], answered: list[int]) -> None:
    """The files of a finished run."""
    run.folder.mkdir(parents=True)

    def rows(name, values, **more):
        return [
            {"id": f"{name}-{number}", "status": "scored", "success": bool(value), **more}
            for number, value in enumerate(values)
        ]

    generations = [row for name, values in success.items() for row in rows("request", values, attack=name)]
    harmless = rows("q", complied, set="compliance") + rows("q", answered, set="utility")
    entry = {
        "name": run.name,
        "attacks": [
            {"name": name, "success": sum(values) / len(values), "n_errored": 0, "n_skipped": 0}
            for name, values in success.items()
        ],
        "utility": {"value": sum(answered) / len(answered)},
        "over_refusal": {"value": 1 - sum(complied) / len(complied)},
    }
    for name, lines in (("generations.jsonl", generations), ("harmless.jsonl", harmless)):
        (run.folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    (run.folder / "results.json").write_text(json.dumps({"models": [entry]}))
    if run.trains:
        phases = {"train": {"seconds": 2.0, "forward_passes": 30.0, "updates": 2}}
        losses = {"boundary_fraction": 0.75}
        (run.folder / "run.json").write_text(json.dumps({"phases": phases, "losses": losses, "hardware": {}}))
    seconds = {"training": 2.0, "measuring": 1.0}
    done = {"fingerprint": run.fingerprint, "seconds": seconds, "settings": run.identity}
    (run.folder / "cell.json").write_text(json.dumps(done))


@pytest.fixture
def swept(place, tmp_path):
    """Two cells with two seeds, the second seed of one missing, and one that shares another's runs."""
    cells = {"usual": {}, "l1": {"attack_norm": "l1"}, "like it": {"attack_sites": ["embedding", 0.25]}}
    values = grid_values(place, output_dir=str(tmp_path / "out"), cells=cells, seeds=[0, 1])
    values["evaluate"]["mean_over"] = ["direct", "prefill"]
    grid = load_grid(write_grid(tmp_path / "grid.yaml", values))
    plan = make_plan(grid)
    success = {
        ("before training", 0): ([1, 1, 1, 1], [1, 1, 1, 1]),
        ("usual", 0): ([0, 0, 0, 1], [0, 1, 0, 1]),
        ("usual", 1): ([0, 0, 0, 0], [0, 1, 0, 1]),
        ("l1", 0): ([0, 0, 0, 0], [0, 0, 0, 1]),
    }
    for run in plan.runs:
        if (run.name, run.seed) in success:
            direct, prefill = success[run.name, run.seed]
            write_run(run, {"direct": direct, "prefill": prefill}, [1, 1, 1, 0], [1, 0])
    return grid, tabulate(grid, plan, {"l1, seed 1": "no luck"})


def test_the_figures_and_the_differences(swept):
    _, table = swept
    cells = {cell["name"]: cell for cell in table["cells"]}
    assert [cell["name"] for cell in table["cells"]] == ["before training", "usual", "l1", "like it"]
    usual = cells["usual"]["figures"]
    assert usual["direct"]["value"] == pytest.approx(1 / 8) and usual["prefill"]["value"] == pytest.approx(4 / 8)
    assert usual["mean success"]["value"] == pytest.approx(5 / 16)
    assert (usual["compliance"]["value"], usual["utility"]["value"]) == (0.75, 0.5)
    assert usual["compliance x utility"]["value"] == pytest.approx(0.375)
    # Seed 0 alone is there on both sides: 3/8 and 1/8.
    difference = cells["l1"]["differences"]["mean success"]
    assert difference["value"] == pytest.approx(-2 / 8) and difference["seeds"] == 1
    assert cells["usual"]["differences"]["mean success"]["value"] == 0.0
    assert cells["like it"]["figures"] == usual and cells["like it"]["same_as"] == "usual"
    assert table["missing"] == [] and table["failed"] == {"l1, seed 1": "no luck"}
    assert [run["boundary_fraction"] for run in cells["usual"]["runs"]] == [0.75, 0.75]


def test_the_files_hold_the_same_figures(swept, tmp_path):
    _, table = swept
    write_all(tmp_path / "written", table)
    assert json.loads((tmp_path / "written" / "sweep.json").read_text()) == json.loads(json.dumps(table))
    page = (tmp_path / "written" / "sweep.md").read_text()
    assert page == markdown(table)
    assert "| usual | 2 | 0.31 [" in page and "| 0.75 | 3 |" in page  # boundary, seconds
    assert "| l1 | -0.25 [" in page
    assert "like it is usual: the sites are embedding, 1 of 4 layers." in page
    assert "l1, seed 1: no luck" in page and "(figures/pareto.png)" in page
    rows = list(csv.DictReader(csv_text(table).splitlines()))
    assert [(row["cell"], row["seed"]) for row in rows][:3] == [
        ("before training", "0"),
        ("usual", "0"),
        ("usual", "1"),
    ]
    assert rows[2]["success prefill"] == "0.5" and rows[2]["boundary_fraction"] == "0.75"
    assert terminal_table(table).row_count == 4


def test_the_picture_shows_every_cell_once_and_the_same_file_every_time(swept):
    _, table = swept
    marks = marks_of(table)
    assert [mark.name for mark in marks] == ["before training", "usual = like it", "l1"]
    assert [mark.kind for mark in marks] == ["before", "baseline", "cell"]
    files = picture_files(table)
    assert files["pareto.png"].startswith(b"\x89PNG") and files == picture_files(table)
    text = files["pareto.svg"].decode()
    assert "<svg" in text and "usual = like it" in text  # as a comment beside its outlines
    assert picture_files({**table, "cells": []}) == {}


def test_the_front_holds_the_cells_that_no_other_beats():
    def mark(number, success, worth):
        return Mark(number, str(number), (success, success, success), (worth, worth, worth), "cell")

    marks = [mark(0, 0.9, 1.0), mark(1, 0.2, 0.9), mark(2, 0.2, 0.8), mark(3, 0.1, 0.5), mark(4, 0.5, 0.85)]
    assert [found.number for found in pareto_front(marks)] == [3, 1, 0]
    assert [found.number for found in pareto_front([mark(0, 0.5, 0.5), mark(1, 0.5, 0.5)])] == [0, 1]
