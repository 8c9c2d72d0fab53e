"""LAP on the organism, with its controls: how docs/lap.md's tables are made, and what they show (`pytest -m slow`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import make_lap_table as study

ALL_RIGHT = "1" * 34


def entry(right, kept=1.0, steps=200, passes=100.0, search=None):
    return {"right": right, "kept": kept, "steps": steps, "forward_passes": passes, "search": search or {}}


def wrong_at(*places):
    return "".join("0" if place in places else "1" for place in range(34))


class TestTables:
    def test_the_arms_are_the_controls_that_were_asked_for(self):
        changes = list(study.ARMS.values())
        assert study.ARMS[study.SUBJECT] == {}
        for wanted in (
            {"lap_branch": "sft_only"},
            {"lap_match_compute": True},
            {"lap_search": "random"},
            {"lap_alpha": 0},
        ):
            assert wanted in changes
        assert any(change.get("lap_search") == "untargeted" for change in changes)
        assert study.RECIPE.is_file()

    def test_the_page_has_a_place_for_the_tables(self):
        page = study.PAGE.read_text(encoding="utf-8")
        assert page.count("<!-- table: make_lap_table.py -->") == page.count("<!-- end of make_lap_table.py -->") == 1

    def test_a_case_counts_as_right_at_worst_only_if_it_is_right_in_all_wordings(self):
        # Rare wordings stand behind the ten plain ones; the last case is wrong in the very wording it was told in.
        found = study.measures(entry([ALL_RIGHT, wrong_at(33), wrong_at(9, 20), wrong_at(0)]))
        assert found["told wording"] == 3 / 4
        assert found["worst of 34"] == 1 / 4
        assert found["worst of 10 plain"] == 2 / 4
        assert found["average"] == pytest.approx((4 * 34 - 4) / (4 * 34))
        assert found["other facts"] == 1.0

    def test_trainings_are_averaged_case_by_case(self):
        runs = [entry([ALL_RIGHT, wrong_at(3)]), entry([ALL_RIGHT, ALL_RIGHT])]
        assert study.over_runs(runs, study.worst_of) == {"00": 1.0, "01": 0.5}
        assert study.over_runs(runs, study.average_of) == {"00": 1.0, "01": pytest.approx(1 - 0.5 / 34)}

    def test_the_differences_are_those_of_lap_minus_the_other_with_intervals(self):
        good, bad = [ALL_RIGHT] * 8, [ALL_RIGHT] * 4 + [wrong_at(12)] * 4
        seeds = {
            seed: {
                study.BASE: [{"right": bad, "kept": 1.0}],
                "SFT": [entry(bad)],
                study.SUBJECT: [entry(good, passes=250.0, search={name: [1, 2, 3, 4] for name in study.WATCHED})],
            }
            for seed in (0, 1)
        }
        text = study.table(seeds)
        (row,) = [line for line in text.splitlines() if line.startswith("| LAP | SFT | worst of 34")]
        cells = [cell.strip() for cell in row.strip("|").split("|")[3:]]
        assert [cell.split()[0] for cell in cells] == ["+0.50"] * 4  # two seeds, all, all but the one tuned on
        low, high = (float(part) for part in cells[0].split("(")[1].rstrip(")").split(","))
        assert 0 < low < 0.5 < high < 1
        assert "| LAP | 1.00 (1.00-1.00) |" in text and "| 200 | 2.5 |" in text
        assert "| LAP | 1, 2, 3, 4 |" in text

    def test_curves_are_averaged_over_quarters_of_the_training(self):
        history = [{"step": step, "lambda_end": float(step)} for step in range(10, 90, 10)] + [
            {"step": 80, "loss": 1.0}
        ]
        assert study._quarters(history)["lambda_end"] == [15.0, 35.0, 55.0, 75.0]

    def test_what_is_finished_is_read_and_what_is_missing_is_run(self, tmp_path, monkeypatch):
        asked = []

        def pretend(organism, changes, seed, output):
            asked.append((changes, seed))
            return entry([ALL_RIGHT])

        (tmp_path / "seed-0.json").write_text(
            json.dumps({study.BASE: [entry([ALL_RIGHT])], "SFT": [entry([wrong_at(1)])]}), encoding="utf-8"
        )
        monkeypatch.setattr(study, "build_organism", lambda *_, **__: None)
        monkeypatch.setattr(study, "train", pretend)
        found = study.run(tmp_path, 0, ["SFT", study.SUBJECT], runs=2)
        assert asked == [(study.ARMS["SFT"], 1), ({}, 0), ({}, 1)]
        assert [len(found[arm]) for arm in ("SFT", study.SUBJECT)] == [2, 2]
        assert found["SFT"][0]["right"] == [wrong_at(1)]
        assert study.run(tmp_path, 0, ["SFT", study.SUBJECT], runs=2) == found
        assert len(asked) == 3


SEEDS = (0, 1, 2, 3, 4)
UNCONSTRAINED = "norm growth alone"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training of some arms on a seed, run once a session."""
    folder, done = tmp_path_factory.mktemp("lap"), {}

    def of(seed: int):
        if seed not in done:
            done[seed] = study.run(folder, seed, ["SFT", UNCONSTRAINED, study.SUBJECT], runs=1)
        return {arm: runs[0] for arm, runs in done[seed].items()}

    return of


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_new_facts_are_learned_in_the_wording_they_are_told_in_and_the_others_stay(trained, seed):
    for arm in ("SFT", study.SUBJECT):
        found = study.measures(trained(seed)[arm])
        assert found["told wording"] >= 0.97
        assert found["other facts"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_training_leaves_a_gap_between_the_told_wording_and_the_worst_that_was_not_there_before(trained, seed):
    found = trained(seed)
    assert study.measures(found["SFT"])["worst of 34"] < study.measures(found[study.BASE])["worst of 34"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_constraint_binds_and_is_kept(trained, seed):
    found = trained(seed)
    search, free = found[study.SUBJECT]["search"], found[UNCONSTRAINED]["search"]
    assert min(search["feasible_end"]) == 1.0
    assert max(search["loss_change_abs_end"]) < 0.005  # the recipe's epsilon
    assert min(free["loss_change_abs_end"]) > 0.05  # the same steps without it
    assert search["lambda_end"][0] > 2 * 30  # raised, from where it begins
    assert search["backoff_scale"][0] < 0.8
    assert min(search["relative_norm"]) > 1.0
