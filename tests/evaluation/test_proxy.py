"""The proxy measures against brute force and cases worked by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.evaluation import conservative_rate, leave_one_attack_out, proxy_correlation, proxy_study
from trl_robust.evaluation.correlation import pearson, ranks
from trl_robust.evaluation.isotonic import isotonic, monotone_map

INF = math.inf
numbers = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


class TestIsotonic:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([1, 2, 3], [1, 2, 3]),
            ([3, 2, 1], [2, 2, 2]),
            ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
            ([4, 1, 1, 2], [2, 2, 2, 2]),
            ([], []),
        ],
    )
    def test_neighbours_in_the_wrong_order_share_their_mean(self, values, expected):
        assert isotonic(values).tolist() == expected

    def test_weights_count_as_repetitions(self):
        assert isotonic([3, 0], [2, 1]).tolist() == [2, 2]

    @given(numbers, st.integers(0, 10))
    def test_it_is_the_nearest_sequence_that_never_falls(self, values, seed):
        found = isotonic(values)
        assert (np.diff(found) >= 0).all()
        assert found.sum() == pytest.approx(sum(values), abs=1e-6)
        assert np.allclose(isotonic(found), found)
        # A projection onto a cone: the residual is orthogonal to the result, and at an obtuse angle to all others.
        residual = np.asarray(values) - found
        assert residual @ found == pytest.approx(0, abs=1e-6)
        other = np.sort(np.random.default_rng(seed).normal(size=len(values)))
        assert residual @ other <= 1e-6

    @given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=10), st.booleans())
    def test_the_map_is_the_best_of_all_monotone_ones_at_the_points(self, pairs, rising):
        x, y = np.array(pairs, dtype=float).T
        found = monotone_map(x, y, x, rising=rising)
        order = np.argsort(x, kind="stable")
        steps = np.diff(found[order])
        assert (steps >= -1e-12).all() if rising else (steps <= 1e-12).all()
        constant = np.full(len(y), y.mean())
        assert ((found - y) ** 2).sum() <= ((constant - y) ** 2).sum() + 1e-9

    def test_between_points_it_is_straight_outside_flat_and_infinity_is_the_largest(self):
        assert monotone_map([0, 2], [0, 1], [-1, 0, 1, 2, 9], rising=True).tolist() == [0, 0, 0.5, 1, 1]
        assert monotone_map([1, 2, INF], [0.9, 0.5, 0.1], [1.5, 50, INF], rising=False).tolist() == [0.7, 0.5, 0.1]
        assert monotone_map([1, 2], [0.9, 0.5], [INF], rising=False).tolist() == [0.5]
        assert monotone_map([INF, INF], [0.2, 0.4], [1, INF], rising=False) == pytest.approx([0.3, 0.3])


class TestCorrelation:
    def test_rho_and_p_are_those_of_all_orders(self):
        generator = np.random.default_rng(3)
        for n in (4, 5, 6):
            x, y = generator.integers(0, 5, n), generator.random(n)
            found = proxy_correlation(x.tolist(), y.tolist())
            rho = pearson(ranks(x), ranks(y))
            every = [pearson(ranks(x[list(order)]), ranks(y)) for order in itertools.permutations(range(n))]
            assert found["rho"] == pytest.approx(rho)
            assert found["p"] == pytest.approx(np.mean(np.abs(every) >= abs(rho) - 1e-9))
            assert found["null"] == pytest.approx(np.quantile(every, [0.025, 0.975]).tolist())

    def test_few_models_have_no_small_p(self):
        for n in (4, 5, 7):
            found = proxy_correlation(list(range(n)), list(range(n)))
            assert found["rho"] == 1 and found["p"] == found["smallest_p"] == pytest.approx(2 / math.factorial(n))
        assert proxy_correlation(list(range(4)), list(range(4)))["smallest_p"] > 0.05
        assert proxy_correlation(list(range(4)), list(range(4)))["detectable"] is None

    def test_many_models_have_random_orders_and_the_seed_settles_them(self):
        x = np.random.default_rng(0).normal(size=20)
        y = x + np.random.default_rng(1).normal(size=20)
        found = proxy_correlation(x, y, seed=1)
        assert found == proxy_correlation(x, y, seed=1)
        assert found["smallest_p"] == 1 / 10_001 <= found["p"] < 0.05
        assert found["interval"][0] < found["rho"] < found["interval"][1]
        assert -found["null"][0] == pytest.approx(found["null"][1], abs=0.05) and found["null"][1] < found["rho"]

    def test_under_no_relation_p_is_even(self):
        generator = np.random.default_rng(5)
        values = [proxy_correlation(generator.random(5), generator.random(5), num_resamples=1)["p"] for _ in range(60)]
        assert 0.35 < np.mean(values) < 0.7

    def test_censored_resistance_ranks_above_all(self):
        found = proxy_correlation([1, 2, 4, INF], [0.9, 0.5, 0.3, 0.1])
        assert found["rho"] == -1
        assert proxy_correlation([INF] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])["rho"] is None

    def test_what_cannot_be_said_is_null_and_says_why(self):
        found = proxy_correlation([1, 2, 3], [1, 2, 3])
        assert found["rho"] is None and "3 models; at least 4" in found["why"]
        found = proxy_correlation([1, 2, 3, 4, None], [0.1, None, 0.3, float("nan"), 0.2])
        assert (found["n"], found["n_left_out"], found["rho"]) == (2, 3, None)
        assert "the same for all 4" in proxy_correlation([1, 2, 3, 4], [0.5] * 4)["why"]
        with pytest.raises(ValueError, match="lengths"):
            proxy_correlation([1, 2], [1])

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=6))
    def test_a_monotone_change_of_unit_changes_nothing(self, pairs):
        x, y = zip(*pairs, strict=True)
        found = proxy_correlation(x, [value / 5 for value in y], num_resamples=20)
        other = proxy_correlation([math.exp(value) for value in x], [value**3 for value in y], num_resamples=20)
        assert found["rho"] == other["rho"] and found["p"] == other["p"]


class TestPrediction:
    X = [0.1, 0.3, 0.5, 0.7, 0.9]

    def test_attacks_that_are_one_function_of_the_measure_are_predicted_exactly(self):
        y = [value**2 for value in self.X]
        found = leave_one_attack_out(self.X, {"a": y, "b": y, "c": y}, of="success")
        assert found["error"] == pytest.approx(0, abs=1e-12)
        assert found["baseline"] == pytest.approx(np.abs(np.array(y) - np.mean(y)).mean())
        assert found["gain"] == pytest.approx(found["baseline"]) and found["gain_interval"][0] > 0

    def test_the_error_is_worked_by_hand_for_two_attacks(self):
        # Each is predicted by the other, pooled where it is not in order: b is (0, 0.3, 0.3) there.
        prompt = {"a": [0.0, 0.2, 0.6, 0.6], "b": [0.0, 0.4, 0.2, 0.8]}
        found = leave_one_attack_out([1, 2, 3, 4], prompt, of="success")
        assert found["attacks"]["a"] == pytest.approx(np.mean([0, 0.1, 0.3, 0.2]))
        assert found["attacks"]["b"] == pytest.approx(np.mean([0, 0.2, 0.4, 0.2]))
        assert found["error"] == pytest.approx(np.mean(list(found["attacks"].values())))
        assert found["baseline"] == pytest.approx(
            np.mean([*(abs(v - 0.35) for v in prompt["a"]), *(abs(v - 0.35) for v in prompt["b"])])
        )

    def test_a_resistance_falls_and_infinity_is_the_most_robust(self):
        y = [0.9, 0.6, 0.2, 0.0]
        found = leave_one_attack_out([1, 4, 8, INF], {"a": y, "b": y}, of="resistance")
        assert found["error"] == pytest.approx(0)
        wrong = leave_one_attack_out([1, 4, 8, INF], {"a": y, "b": y}, of="success")
        assert wrong["error"] == pytest.approx(wrong["baseline"]) and wrong["gain"] == pytest.approx(0)

    def test_a_model_that_is_left_out_is_not_in_its_own_prediction(self):
        y = [0.0, 0.0, 0.0, 1.0]
        known = leave_one_attack_out([1, 2, 3, 4], {"a": y, "b": y}, of="success")
        new = leave_one_attack_out([1, 2, 3, 4], {"a": y, "b": y}, of="success", leave_model_out=True)
        # The third model lies between 0 at 2 and 1 at 4, the last beyond 0 at 3.
        assert known["error"] == 0 and new["error"] == pytest.approx((0.5 + 1) / 4)
        assert leave_one_attack_out([1, 2, 2.5, 4], {"a": y, "b": y}, of="success", leave_model_out=True)[
            "error"
        ] == pytest.approx((0.25 + 1) / 4)

    def test_a_measure_without_relation_gains_nothing(self):
        generator = np.random.default_rng(0)
        prompt = {name: generator.random(30) for name in "abc"}
        found = leave_one_attack_out(generator.random(30), prompt, of="success", leave_model_out=True)
        assert found["gain"] < 0.02 and found["gain_interval"][0] < 0

    def test_too_little_is_null_and_says_why(self):
        found = leave_one_attack_out([1, 2, 3], {"a": [0, 0, 1], "b": [0, 1, 1]}, of="success")
        assert found["error"] is None and "3 models" in found["why"]
        found = leave_one_attack_out([1, 2, 3, 4], {"a": [0, 0, 1, 1]}, of="success")
        assert found["error"] is None and "1 attacks" in found["why"]
        with pytest.raises(ValueError, match="resistance"):
            leave_one_attack_out([1], {"a": [0]}, of="size")
        with pytest.raises(ValueError, match="infinite"):
            leave_one_attack_out([1, 2, 3, 4], {"a": [0, 0, 1, INF], "b": [0] * 4}, of="success")


class TestConservative:
    def test_it_is_the_share_of_models_where_no_prompt_succeeds_more_often(self):
        prompt = {"a": [0.1, 0.5, 0.2, 0.3, None], "b": [0.2, 0.1, 0.9, 0.3, 0.1]}
        found = conservative_rate([0.2, 0.6, 0.7, 0.1 + 0.2, 1.0], prompt)
        assert (found["rate"], found["exceptions"], found["n"], found["n_left_out"]) == (0.75, [2], 4, 1)
        assert found["largest_excess"] == pytest.approx(0.2)
        assert found["interval"][0] < 0.75 <= found["interval"][1]

    def test_all_models_agreeing_is_no_certainty(self):
        found = conservative_rate([1.0] * 5, {"a": [0.5] * 5})
        assert found["rate"] == 1 and found["interval"][0] < 0.6 and found["largest_excess"] == 0

    def test_too_little_is_null_and_says_why(self):
        assert "3 models" in conservative_rate([1] * 3, {"a": [0] * 3})["why"]
        assert "no attack" in conservative_rate([1] * 5, {})["why"]


class TestStudy:
    PROMPT = {"a": [0.9, 0.7, 0.4, 0.2, 0.0], "b": [0.6, 0.8, 0.1, 0.1, 0.1]}
    MODELS = ["m0", "m1", "m2", "m3", "m4"]

    def test_it_holds_every_part_and_is_json(self):
        found = proxy_study(self.MODELS, [1, 2, 8, 16, INF], self.PROMPT, of="resistance", success=[1, 0.8, 1, 0, 1])
        assert found["correlations"]["a"] == proxy_correlation([1, 2, 8, 16, INF], self.PROMPT["a"])
        assert set(found["correlations"]) == {"a", "b", "largest", "mean"}
        assert found["correlations"]["a"]["rho"] == pytest.approx(-1)
        largest = proxy_correlation([1, 2, 8, 16, INF], [0.9, 0.8, 0.4, 0.2, 0.1])
        assert found["correlations"]["largest"] == largest
        assert found["prediction"]["leave_model_out"] is False
        assert found["prediction_of_new_models"]["leave_model_out"] is True
        assert found["conservative"]["exceptions"] == [3]
        assert "5 models" in found["note"] and found["n"] == 5
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_a_resistance_alone_has_no_conservative_rate_and_success_is_its_own(self):
        assert proxy_study(self.MODELS, [1, 2, 8, 16, INF], self.PROMPT, of="resistance")["conservative"] is None
        found = proxy_study(self.MODELS, [0.9, 0.7, 0.5, 0.3, 0.1], self.PROMPT, of="success")
        assert found["conservative"]["exceptions"] == [1]

    def test_three_models_give_nulls_throughout_and_the_note_says_so(self):
        prompt = {name: column[:3] for name, column in self.PROMPT.items()}
        found = proxy_study(self.MODELS[:3], [0.5, 0.4, 0.3], prompt, of="success")
        parts = [*found["correlations"].values(), found["prediction"], found["conservative"]]
        assert all(part["why"] for part in parts)
        assert all(part[key] is None for part in parts for key in ("rho", "error", "rate") if key in part)
        assert "3 models are too few" in found["note"]

    def test_what_does_not_fit_together_is_refused(self):
        with pytest.raises(ValueError, match="one each"):
            proxy_study(["m"], [1, 2], self.PROMPT, of="success")
        with pytest.raises(ValueError, match="stand for all"):
            proxy_study(self.MODELS, [1] * 5, {"largest": [0] * 5}, of="success")
