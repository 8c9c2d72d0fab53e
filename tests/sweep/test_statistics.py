"""Means and paired differences over requests and seeds, on figures made by hand."""

import pytest

from trl_robust.evaluation import attack_success
from trl_robust.sweep.statistics import difference_of, mean_of, mean_over, product_of, scores_of

HARD = {0: {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0}, 1: {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.0}}
EASY = {0: {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.0}, 1: {"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0}}


def test_the_mean_is_over_requests_and_seeds():
    found = mean_of(HARD)
    assert found["value"] == pytest.approx(3.5 / 8)
    assert (found["seeds"], found["rows"]) == (2, 8)
    low, high = found["interval"]
    assert 0 <= low < 3.5 / 8 < high <= 1


def test_a_difference_is_paired_by_request_and_seed_and_narrower_than_the_means():
    found = difference_of(EASY, HARD)
    assert found["value"] == pytest.approx(-1 / 8)
    low, high = found["interval"]
    assert low <= -1 / 8 <= high
    assert high - low < mean_of(HARD)["interval"][1] - mean_of(HARD)["interval"][0]
    assert difference_of(HARD, EASY)["value"] == pytest.approx(1 / 8)


def test_only_what_both_have_is_compared():
    found = difference_of({0: {"a": 1.0, "x": 1.0}, 2: {"a": 0.0}}, HARD)
    assert (found["value"], found["rows"], found["seeds"]) == (0.0, 1, 1)
    assert difference_of({5: {"a": 1.0}}, HARD)["value"] is None


def test_seeds_that_disagree_widen_the_interval():
    rows = [str(number) for number in range(40)]
    agree = {seed: {row: float(int(row) % 2) for row in rows} for seed in range(3)}
    disagree = {seed: {row: float(seed == 0 or (seed == 1 and int(row) % 2)) for row in rows} for seed in range(3)}
    widths = [interval[1] - interval[0] for interval in (mean_of(agree)["interval"], mean_of(disagree)["interval"])]
    assert widths[1] > 2 * widths[0]


def test_with_one_seed_it_is_the_bootstrap_over_requests():
    rows = {str(number): float(number % 3 == 0) for number in range(60)}
    ours, usual = mean_of({0: rows})["interval"], attack_success(list(rows.values()))["interval"]
    assert ours == pytest.approx(usual, abs=0.02)


def test_scores_without_spread_have_wilsons_interval_and_not_certainty():
    nothing = {0: dict.fromkeys("abcdefghij", 0.0)}
    assert mean_of(nothing)["interval"] == pytest.approx(attack_success([0.0] * 10)["interval"])
    low, high = difference_of(nothing, nothing)["interval"]
    assert low < 0 < high
    certain = difference_of({0: dict.fromkeys("abcdefghij", 1.0)}, nothing)
    assert certain["value"] == 1.0 and certain["interval"][0] < 1.0 and certain["interval"][1] == 1.0
    assert mean_of({0: {"benchmarks": 0.6}})["interval"] is None  # one figure has no interval
    assert mean_of({})["value"] is None


def test_a_product_has_the_product_of_the_means():
    found = product_of(HARD, EASY)
    assert found["value"] == pytest.approx(3.5 / 8 * 2.5 / 8)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    half = product_of(HARD, {0: {"q": 1.0, "r": 1.0}, 1: {"q": 1.0, "r": 1.0}})
    assert half["value"] == pytest.approx(3.5 / 8) and half["interval"][0] < 3.5 / 8
    assert product_of(HARD, {})["value"] is None


def test_rows_that_were_not_scored_are_in_no_mean():
    rows = [
        {"id": "a", "status": "scored", "success": True},
        {"id": "b", "status": "errored", "success": None},
        {"id": "c", "status": "skipped", "success": None},
    ]
    assert scores_of(rows) == {"a": 1.0}
    by_attack = {"one": {"a": 1.0, "b": 0.0}, "two": {"a": 0.0}, "three": {"a": 1.0}}
    assert mean_over(by_attack, ["one", "two"]) == {"a": 0.5}
    assert mean_over(by_attack, ["one", "absent"]) == {}
