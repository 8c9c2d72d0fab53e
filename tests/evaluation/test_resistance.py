"""Resistance against definitions worked by hand and a bootstrap written out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.evaluation import (
    area_between,
    attack_success,
    envelope,
    factor_of_safety,
    intact,
    measured_resistance,
    resistance,
    resistance_interval,
)

MEANS = [(1, 0.0), (2, 0.1), (4, 0.4), (8, 0.3), (16, 0.8)]

budgets = st.lists(st.integers(0, 1000), min_size=1, max_size=8, unique=True)
means = budgets.flatmap(
    lambda own: st.lists(st.floats(0, 1), min_size=len(own), max_size=len(own)).map(
        lambda success: list(zip(own, success, strict=True))
    )
)
thresholds = st.floats(0.01, 1)


def table(rows, budgets=(1, 2, 4, 8)):
    """A curve from one list of results a request."""
    return [(budget, [row[number] for row in rows]) for number, budget in enumerate(budgets)]


class TestResistance:
    @pytest.mark.parametrize(
        ("threshold", "expected"), [(0.1, 2), (0.2, 4), (0.4, 4), (0.41, 16), (0.8, 16), (0.81, math.inf)]
    )
    def test_it_is_the_first_budget_that_reaches_the_threshold(self, threshold, expected):
        assert resistance(MEANS, threshold) == expected
        assert resistance(MEANS[::-1], threshold) == expected

    def test_a_threshold_is_reached_whatever_rounding_does_to_a_mean(self):
        assert resistance([(1, 0.1 + 0.2), (2, 1.0)], 0.3) == 1
        assert resistance([(1, sum([0.1] * 3) / 1 - 1e-12)], 0.3) == 1

    def test_budget_zero_counts(self):
        assert resistance([(0, 0.5), (1, 0.9)], 0.5) == 0

    @given(means, thresholds, thresholds)
    def test_it_never_falls_as_the_threshold_rises(self, curve, one, other):
        low, high = sorted((one, other))
        assert resistance(curve, low) <= resistance(curve, high)

    @given(means, thresholds)
    def test_it_is_a_measured_budget_and_no_smaller_one_reaches_it(self, curve, threshold):
        found = resistance(curve, threshold)
        reached = [budget for budget, success in curve if success >= threshold - 1e-9]
        assert found == min(reached, default=math.inf)

    @given(means, thresholds, st.floats(0.1, 10))
    def test_a_factor_is_the_resistance_over_the_load(self, curve, threshold, load):
        assert factor_of_safety(curve, threshold, load) == resistance(curve, threshold) / load

    def test_a_request_that_was_broken_once_stays_broken(self):
        curve = table([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
        assert envelope(curve).success.tolist() == [0.25, 0.5, 0.75, 0.75]
        assert resistance(curve, 0.5) == 2
        # Of the means alone, nobody knows that.
        means = [(budget, float(np.mean(row))) for budget, row in curve]
        assert resistance(means, 0.5) == math.inf

    @pytest.mark.parametrize(
        ("curve", "said"),
        [
            ([], "no points"),
            ([(1, 1.5)], "outside"),
            ([(1, float("nan"))], "outside"),
            ([(-1, 0.5)], "budget -1"),
            ([(math.inf, 0.5)], "budget inf"),
            ([0.5], "pair"),
            ([(1, 0.5), (2, [True])], "same form"),
            ([(1, [True, False]), (2, [True])], "hold 1, 2 results"),
            ([(1, [None]), (2, [None])], "No request"),
        ],
    )
    def test_what_is_no_curve_is_refused(self, curve, said):
        with pytest.raises(ValueError, match=said):
            resistance(curve, 0.5)

    def test_bad_thresholds_and_loads_are_refused(self):
        for threshold in (0, -1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="threshold"):
                resistance(MEANS, threshold)
        for load in (0, -1, math.inf, float("nan")):
            with pytest.raises(ValueError, match="load"):
                factor_of_safety(MEANS, 0.5, load)


class TestRequests:
    ROWS = [
        (1, [{"id": "a", "success": False}, {"id": "b", "success": True}, {"id": "c", "status": "errored"}]),
        (2, [{"id": "b", "success": False}, {"id": "c", "success": True}, {"id": "a", "success": 0.5}]),
    ]

    def test_rows_are_matched_by_id_and_what_errored_once_is_in_no_budget(self):
        found = envelope(self.ROWS)
        assert found.ids == ["a", "b"] and found.n_left_out == 1
        assert found.requests.tolist() == [[0, 0.5], [1, 1]]

    def test_none_and_nan_are_results_that_there_are_not(self):
        found = envelope([(1, [True, None, False]), (2, [False, True, float("nan")])])
        assert (found.ids, found.n_left_out, found.success.tolist()) == ([0], 2, [1, 1])

    def test_a_budget_without_any_score_is_left_out_and_takes_no_request_with_it(self):
        found = envelope([(1, [False, True]), (2, [None, None]), (4, [True, True])])
        assert (found.budgets.tolist(), found.n, found.n_unscored) == ([1, 4], 2, 1)

    def test_of_several_attempts_the_best_counts(self):
        attempts = [{"id": "a", "success": x} for x in (0.2, 0.7, 0.1)] + [{"id": "a", "status": "errored"}]
        assert envelope([(1, attempts)]).success.tolist() == [0.7]
        assert envelope([(1, [False, True]), (1, [True, False])]).success.tolist() == [1.0]

    @given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12))
    def test_the_envelope_never_falls_and_is_at_least_the_envelope_of_the_means(self, rows):
        found = envelope(table(rows)).success
        of_means = envelope([(budget, float(np.mean(row))) for budget, row in table(rows)]).success
        assert (np.diff(found) >= 0).all() and (found >= of_means - 1e-12).all()


class TestInterval:
    def test_it_is_the_percentile_bootstrap_of_the_resistance(self):
        generator = np.random.default_rng(1)
        needed = generator.choice([1, 2, 4, 8, 16, 99], size=40, p=[0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
        curve = [(budget, (needed <= budget).tolist()) for budget in (1, 2, 4, 8, 16)]
        for threshold in (0.2, 0.5, 0.8):
            drawn = generator.choice(needed, size=(4000, 40))
            shares = np.stack([(drawn <= budget).mean(1) for budget, _ in curve], axis=1)
            values = [
                next(
                    (budget for (budget, _), share in zip(curve, row, strict=True) if share >= threshold - 1e-9),
                    np.inf,
                )
                for row in shares
            ]
            expected = np.quantile(values, [0.025, 0.975], method="inverted_cdf").tolist()
            assert resistance_interval(curve, threshold, num_resamples=4000) == expected

    def test_requests_that_all_agree_are_no_certainty(self):
        never = [(1, [False] * 10), (2, [False] * 10)]
        upper = attack_success([False] * 10)["interval"][1]
        assert resistance(never, 0.2) == math.inf and upper > 0.2
        assert resistance_interval(never, 0.2) == [1, math.inf]
        assert resistance_interval(never, 0.5) == [math.inf, math.inf]

    @given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=12), thresholds)
    def test_its_ends_are_in_order_and_are_measured_budgets(self, rows, threshold):
        low, high = resistance_interval(table(rows), threshold, num_resamples=50)
        assert low <= high and {low, high} <= {1, 2, 4, 8, math.inf}

    def test_means_have_none_and_the_seed_settles_it(self):
        assert resistance_interval(MEANS, 0.5) is None
        curve = table([[i > 2, i > 1, True, True] for i in range(5)])
        assert resistance_interval(curve, 0.5, seed=3) == resistance_interval(curve, 0.5, seed=3)
        with pytest.raises(ValueError, match="confidence"):
            resistance_interval(curve, 0.5, confidence=2)


class TestIntact:
    def test_a_relative_loss_above_the_limit_destroys_and_the_limit_itself_does_not(self):
        found = intact(MEANS, [0.6, 0.54, 0.5399, None, float("nan")], 0.6)
        assert [point[0] for point in found.curve] == [1, 2]
        assert (found.destroyed, found.unknown) == ([4, 16], [8])

    def test_loss_is_counted_above_chance_and_upside_down_for_perplexity(self):
        assert intact([(1, 0)], [0.56], 0.6).destroyed == []
        assert intact([(1, 0)], [0.56], 0.6, chance=0.25).destroyed == [1]
        assert intact([(1, 0), (2, 0), (3, 0)], [9, 11, 11.1], 10, higher_is_better=False).destroyed == [3]

    def test_what_cannot_be_compared_is_refused(self):
        with pytest.raises(ValueError, match="one each"):
            intact(MEANS, [0.5], 0.5)
        with pytest.raises(ValueError, match="exceed chance"):
            intact([(1, 0)], [0.5], 0.25, chance=0.25)


class TestMeasured:
    CURVE = table([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, None]])

    def test_a_reached_threshold_has_a_factor_and_says_what_it_is(self):
        found = measured_resistance("latent", self.CURVE, 0.5, unit="radius", load=2, load_is="radius / displacement")
        assert (found["resistance"], found["factor"], found["censored_at"]) == (4, 2, None)
        assert (found["n"], found["n_left_out"], found["n_points"], found["n_destroyed"]) == (3, 1, 4, 0)
        assert found["factor_interval"] == [end and end / 2 for end in found["interval"]]
        assert found["load_is"] == "radius / displacement" and found["attack"] == "latent"

    def test_a_censored_one_is_null_with_where_it_was_given_up(self):
        found = measured_resistance("a", MEANS, 0.9, unit="steps", load=4, load_is="x")
        assert (found["resistance"], found["factor"], found["censored_at"], found["factor_above"]) == (
            None,
            None,
            16,
            4,
        )
        assert found["interval"] is None and "at most 0.8" in found["why"]
        found = measured_resistance("a", [(1, [False] * 9 + [True])], 0.5, unit="steps")
        assert found["interval"] == [None, None] and found["factor"] is None

    def test_destroyed_points_are_left_out_and_counted(self):
        ability = [1.0, 1.0, 0.95, 0.5]
        found = measured_resistance("a", self.CURVE, 0.9, unit="steps", capability=ability, untouched=1.0)
        # Without the last point the request that errored there is in.
        assert (found["resistance"], found["censored_at"], found["n_destroyed"], found["n"]) == (None, 4, 1, 4)
        found = measured_resistance("a", self.CURVE, 0.9, unit="steps", capability=[0, 0, 0, None], untouched=1.0)
        assert (found["n_destroyed"], found["n_unknown"], found["n_points"]) == (3, 1, 0)
        assert found["resistance"] is None and found["censored_at"] is None and "intact" in found["why"]

    @given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6), thresholds)
    def test_it_is_json_and_agrees_with_the_plain_functions(self, rows, threshold):
        curve = table(rows)
        found = measured_resistance("a", curve, threshold, unit="n", load=2, load_is="x", num_resamples=20)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        expected = resistance(curve, threshold)
        assert found["resistance"] == (None if math.isinf(expected) else expected)
        expected = factor_of_safety(curve, threshold, 2)
        assert found["factor"] == (None if math.isinf(expected) else expected)

    def test_what_is_missing_is_asked_for(self):
        with pytest.raises(ValueError, match="load_is"):
            measured_resistance("a", MEANS, 0.5, unit="n", load=2)
        with pytest.raises(ValueError, match="untouched"):
            measured_resistance("a", MEANS, 0.5, unit="n", capability=[1] * 5)
        with pytest.raises(ValueError, match="no points"):
            measured_resistance("a", [], 0.5, unit="n")


class TestArea:
    def test_a_straight_rise_against_nothing_is_half(self):
        nothing = [(1, 0.0), (100, 0.0)]
        for axis in ("log", "linear"):
            assert area_between([(1, 0.0), (100, 1.0)], nothing, axis=axis)["area"] == pytest.approx(0.5)
        # On a logarithmic axis the middle lies at 10.
        assert area_between([(1, 0.0), (10, 1.0), (100, 1.0)], nothing)["area"] == pytest.approx(0.75)
        found = area_between([(1, 0.0), (10, 1.0), (100, 1.0)], nothing, axis="linear")
        assert found["area"] == pytest.approx((9 / 2 + 90) / 99)
        assert found["budgets"] == [1, 100] and found["interval"] is None and found["paired"] is False

    def test_only_the_stretch_that_both_cover_counts(self):
        found = area_between([(1, 0.2), (4, 0.6), (64, 1.0)], [(2, 0.0), (16, 0.0)])
        # Straight lines in log2: 0.4 at 2, 0.6 at 4, 0.8 at 16.
        assert found["area"] == pytest.approx((0.5 * 1 + 0.7 * 2) / 3)
        assert found["budgets"] == pytest.approx([2, 16])
        assert area_between([(1, 0.0), (2, 0.0)], [(4, 0.0), (8, 0.0)])["area"] is None
        assert area_between([(0, 0.5)], [(0, 0.5)])["area"] is None

    def test_what_budget_zero_reached_counts_from_the_smallest_positive_one(self):
        assert area_between([(0, 0.5), (1, 0.2), (2, 0.5)], [(1, 0.0), (2, 0.0)])["area"] == pytest.approx(0.5)

    @given(means, means)
    def test_it_changes_its_sign_with_the_order_and_the_unit_does_not_matter(self, first, second):
        for axis in ("log", "linear"):
            found, back = (area_between(*both, axis=axis)["area"] for both in ((first, second), (second, first)))
            scaled = area_between(
                *([(7 * budget, success) for budget, success in curve] for curve in (first, second)), axis=axis
            )["area"]
            if found is not None:
                assert -1 - 1e-9 <= found <= 1 + 1e-9
                assert found == pytest.approx(-back) and found == pytest.approx(scaled, abs=1e-6)

    def test_the_interval_is_paired_over_the_same_requests_and_narrower(self):
        generator = np.random.default_rng(0)
        hard = generator.random(60)
        first = [(budget, (hard < budget / 10).tolist()) for budget in (1, 4, 9)]
        second = [(budget, (hard < budget / 12).tolist()) for budget in (1, 4, 9)]
        paired = area_between(first, second, axis="linear")
        named = [(b, [{"id": f"x{i}", "success": v} for i, v in enumerate(row)]) for b, row in second]
        apart = area_between(first, named, axis="linear")
        assert paired["paired"] and not apart["paired"] and paired["area"] == pytest.approx(apart["area"])
        for found in (paired, apart):
            assert found["interval"][0] < found["area"] < found["interval"][1]
        width = [found["interval"][1] - found["interval"][0] for found in (paired, apart)]
        assert width[0] < 0.5 * width[1]

    def test_an_unknown_axis_is_refused(self):
        with pytest.raises(ValueError, match="axis"):
            area_between(MEANS, MEANS, axis="cube")
