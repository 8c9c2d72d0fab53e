"""The measures over wordings: numbers worked by hand, properties, and the metrics that `evaluate` takes."""

from __future__ import annotations

import math
import os

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.evaluation import (
    AttackSuccess,
    PromptRobustness,
    WinRate,
    kendalls_w,
    paired_robustness,
    prompt_robustness,
    ranking_agreement,
    same_prompt_null,
    win_rate,
)
from trl_robust.evaluation.robustness import MEASURES

# Case one: 0, 0.1, ..., 1, the original in the middle. Case two: the original 0.8, all other wordings 0.2.
TABLE = [
    [0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 0.0],
    [0.8, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
]
BY_HAND = {  # (case one, case two)
    "original": (0.5, 0.8),
    "worst": (0.0, 0.2),
    "best": (1.0, 0.8),
    "average": (0.5, 2.8 / 11),
    "std": (
        0.1 * math.sqrt(10),
        0.6 * math.sqrt(10) / 11,
    ),  # on 11 even points; 1/11 of them 0.6 away
    "gap": (1.0, 0.6),
    "worst_3": (0.1, 0.2),
    "cvar": ((0 + 0.1 + 0.75 * 0.2) / 2.75, 0.2),  # a quarter of 11 wordings are 2.75
}

scores = st.floats(-5, 5, allow_nan=False, width=32)
matrices = st.integers(2, 6).flatmap(
    lambda width: st.lists(st.lists(scores, min_size=width, max_size=width), min_size=2, max_size=5)
)


def values_of(found) -> np.ndarray:
    return np.array([found[name] for name in MEASURES], dtype=float)


class TestPromptRobustness:
    @pytest.mark.parametrize("name", MEASURES)
    def test_the_table_has_the_values_worked_by_hand(self, name):
        found = prompt_robustness(TABLE)
        assert found[name] == pytest.approx(sum(BY_HAND[name]) / 2, abs=1e-12)
        # Of two cases, a resample is one of them twice with probability 1/4: the interval is from one to the other.
        assert found["intervals"][name] == pytest.approx(sorted(BY_HAND[name]), abs=1e-12)

    def test_counts_of_the_table(self):
        found = prompt_robustness(TABLE)
        assert (found["n_cases"], found["n_excluded"], found["n_missing"], found["cvar_level"]) == (2, 0, 0, 0.25)

    @given(matrices)
    def test_worst_original_and_best_are_in_order(self, matrix):
        found = prompt_robustness(matrix, num_resamples=10)
        tolerance = 1e-9
        assert found["worst"] <= found["original"] + tolerance <= found["best"] + 2 * tolerance
        assert found["worst"] <= found["cvar"] + tolerance <= found["average"] + 2 * tolerance
        assert found["worst"] <= found["worst_3"] + tolerance <= found["average"] + 2 * tolerance
        assert found["gap"] == pytest.approx(found["best"] - found["worst"], abs=1e-9)
        assert 0 <= found["std"] <= found["gap"] / 2 + tolerance

    @given(matrices, st.floats(-3, 3))
    def test_a_constant_moves_the_levels_and_not_the_spread(self, matrix, shift):
        before = values_of(prompt_robustness(matrix, num_resamples=1))
        after = values_of(prompt_robustness(np.array(matrix) + shift, num_resamples=1))
        expected = [0 if name in ("std", "gap") else shift for name in MEASURES]
        np.testing.assert_allclose(after - before, expected, atol=1e-9)

    @given(matrices, st.randoms(use_true_random=False))
    def test_the_order_of_cases_and_of_paraphrases_does_not_matter(self, matrix, random):
        mixed = [[row[0], *random.sample(row[1:], len(row) - 1)] for row in random.sample(matrix, len(matrix))]
        np.testing.assert_allclose(
            values_of(prompt_robustness(mixed, num_resamples=1)),
            values_of(prompt_robustness(matrix, num_resamples=1)),
            atol=1e-9,
        )

    def test_identical_wordings_have_no_spread_and_no_false_certainty(self):
        found = prompt_robustness([[0.1] * 11] * 3)
        assert found["std"] == found["gap"] == 0
        assert found["worst"] == found["best"] == found["cvar"] == pytest.approx(0.1)
        assert found["intervals"]["worst"] is None
        # With the scale's ends, as in attack_success: 0 of 3 may be as much as z^2 / (3 + z^2).
        worst = prompt_robustness([[0.0] * 11] * 3, scale=(0, 1))["intervals"]["worst"]
        assert worst == pytest.approx([0, 3.8415 / 6.8415], abs=1e-4)

    @pytest.mark.parametrize("missing", [None, float("nan")])
    def test_a_missing_score_is_counted_and_never_a_zero(self, missing):
        found = prompt_robustness([[0.5, missing, 0.9], [0.4, 0.3, 0.6]])
        assert found["worst"] == pytest.approx((0.5 + 0.3) / 2)
        assert (found["n_cases"], found["n_excluded"], found["n_missing"]) == (2, 0, 1)

    def test_a_case_without_its_original_or_with_one_score_is_left_out(self):
        nan = float("nan")
        found = prompt_robustness([[nan, 0.1, 0.2], [0.5, nan, nan], [nan] * 3, [0.4, 0.3, 0.6]])
        assert (found["original"], found["worst"]) == (0.4, 0.3)
        assert (found["n_cases"], found["n_excluded"], found["n_missing"]) == (1, 3, 6)

    def test_nothing_scored_is_none(self):
        found = prompt_robustness([[None, None]])
        assert found["worst"] is None and found["intervals"]["worst"] is None and found["n_excluded"] == 1

    def test_the_interval_covers_the_mean(self):
        generator = np.random.default_rng(0)
        covered = 0
        for _ in range(200):
            cases = generator.uniform(size=(40, 1)) + generator.uniform(size=(40, 3))
            low, high = prompt_robustness(cases, num_resamples=400)["intervals"]["average"]
            covered += low <= 1.0 <= high
        assert 0.88 <= covered / 200 <= 0.99  # a standard error of 0.015 around a little under 0.95

    @pytest.mark.parametrize(
        ("matrix", "settings", "said"),
        [
            ([], {}, "no cases"),
            ([0.1, 0.2], {}, "Row 0"),
            (["abc"], {}, "Row 0"),
            ([[0.1, "high"]], {}, "no number"),
            ([[0.1, [0.2]]], {}, "Row 0"),
            ([[0.1, float("inf")]], {}, "infinite"),
            ([[0.1, 0.2]], {"cvar_level": 0}, "cvar_level"),
            ([[0.1, 0.2]], {"confidence": 95}, "confidence"),
            ([[0.1, 0.2]], {"num_resamples": 0}, "num_resamples"),
            ([[0.1, 0.2]], {"scale": (1, 0)}, "scale"),
        ],
    )
    def test_wrong_input_is_refused(self, matrix, settings, said):
        with pytest.raises(ValueError, match=said):
            prompt_robustness(matrix, **settings)


class TestPaired:
    def test_a_model_that_is_better_everywhere_by_the_same_differs_by_that(self):
        other = (np.array(TABLE) + 0.1).tolist()
        found = paired_robustness(TABLE, other, scale=(0, 2))
        for name in MEASURES:
            assert found["differences"][name] == pytest.approx(0 if name in ("std", "gap") else 0.1)
        assert found["intervals"]["worst"][0] < 0.1 < found["intervals"]["worst"][1]

    def test_pairing_is_narrower_than_two_separate_intervals(self):
        generator = np.random.default_rng(1)
        first = generator.uniform(size=(50, 1)) + 0.1 * generator.uniform(size=(50, 4))
        second = first + 0.05 + 0.02 * generator.uniform(size=(50, 4))
        low, high = paired_robustness(first, second)["intervals"]["average"]
        alone = prompt_robustness(first)["intervals"]["average"]
        assert 0 < low < high and high - low < (alone[1] - alone[0]) / 10

    def test_a_wording_that_one_lacks_counts_for_neither(self):
        found = paired_robustness([[0.5, 0.0, 0.4]], [[0.5, None, 0.3]])
        assert found["differences"]["worst"] == pytest.approx(-0.1)
        assert found["n_missing"] == 1

    def test_different_shapes_are_refused(self):
        with pytest.raises(ValueError, match="2 cases and matrix_b 1"):
            paired_robustness(TABLE, TABLE[:1])
        with pytest.raises(ValueError, match="Case 0 has 2 wordings"):
            paired_robustness([[1, 2]], [[1, 2, 3]])


class TestSamePromptNull:
    def test_wordings_that_do_no_more_than_luck_have_no_excess(self):
        found = same_prompt_null(TABLE, [TABLE[0][::-1], TABLE[1]])
        assert all(value == pytest.approx(0) for value in found["excess"].values())

    def test_samples_that_never_change_leave_all_to_the_wordings(self):
        found = same_prompt_null(TABLE, [[0.5] * 11, [0.8] * 11])
        assert found["excess"]["worst"] == pytest.approx((0 - 0.5 + 0.2 - 0.8) / 2)
        assert found["excess"]["gap"] == pytest.approx((1.0 + 0.6) / 2)
        assert found["intervals"]["gap"] == pytest.approx([0.6, 1.0])

    def test_fewer_samples_than_wordings_are_compared_at_the_smaller_number(self):
        # Of 0, 0.1, ..., 1 two drawn without replacement have the lower at 0.3 and the higher at 0.7 on average.
        found = same_prompt_null(TABLE[:1], [[0.5, 0.5]])
        assert found["n_compared"] == 2
        assert found["wordings"]["worst"] == pytest.approx(0.3) and found["wordings"]["gap"] == pytest.approx(0.4)

    def test_missing_samples_are_counted(self):
        found = same_prompt_null([[0.1, 0.2], [0.3, 0.4]], [[0.1, None], [0.3, 0.3]])
        assert (found["n_cases"], found["n_excluded"], found["n_missing"]) == (1, 1, 1)


class TestRankings:
    def test_by_hand(self):
        assert kendalls_w([[1, 2, 3], [1, 2, 3]]) == 1
        assert kendalls_w([[1, 2, 3], [3, 2, 1]]) == 0
        # Rank sums 5, 6, 7: 12 * 2 / (9 * 24).
        assert kendalls_w([[1, 2, 3], [1, 2, 3], [3, 2, 1]]) == pytest.approx(1 / 9)
        # With a tie the rank sums are 2.5, 3.5, 6: 12 * 6.5 / (4 * 24 - 2 * 6).
        assert kendalls_w([[7, 7, 9], [0.1, 0.2, 0.3]]) == pytest.approx(78 / 84)
        assert kendalls_w([[1, 1], [2, 2]]) is None

    def test_rankings_at_random_agree_at_the_level_that_is_called_chance(self):
        generator = np.random.default_rng(0)
        found = ranking_agreement([generator.uniform(size=(300, 11)) for _ in range(3)])
        assert found["chance"] == pytest.approx(1 / 3)
        assert found["interval"][0] < 1 / 3 < found["interval"][1]

    def test_cases_without_a_ranking_are_left_out(self):
        found = ranking_agreement([[[1, 1], [1, 2], [1, None]], [[2, 2], [1, 2], [3, 4]]])
        assert (found["kendalls_w"], found["n_cases"], found["n_excluded"]) == (1, 1, 2)
        with pytest.raises(ValueError, match="at least two"):
            ranking_agreement([TABLE])


class TestWinRate:
    def test_by_hand(self):
        found = win_rate([1.0, 0.5, 0.0])
        assert found["win_rate"] == 50
        assert found["standard_error"] == pytest.approx(100 * 0.5 / math.sqrt(3))
        assert found["n"] == 3

    def test_too_few_and_missing(self):
        assert win_rate([]) == {"win_rate": None, "standard_error": None, "n": 0, "n_missing": 0}
        found = win_rate([1.0, None, float("nan")])
        assert (found["win_rate"], found["standard_error"], found["n_missing"]) == (100, None, 2)

    def test_a_preference_outside_the_scale_is_refused(self):
        with pytest.raises(ValueError, match="1 to 2"):
            win_rate([0.5, 1.4])


class TestMetrics:
    def test_a_table_gives_plain_floats(self):
        found = PromptRobustness().compute(predictions=TABLE)
        assert all(type(value) is float for value in found.values())
        for name in MEASURES:
            assert found[f"prompt_{name}"] == pytest.approx(sum(BY_HAND[name]) / 2)
            assert found[f"prompt_{name}_low"] == pytest.approx(min(BY_HAND[name]))
        assert found["prompt_n_cases"] == 2

    def test_a_wordings_score_that_is_missing_is_counted(self):
        metric = PromptRobustness()
        metric.add_batch(predictions=[[0.5, None], [0.5, 0.1]])
        metric.add(prediction=[0.7, float("nan")])
        found = metric.compute()
        assert (found["prompt_n_excluded"], found["prompt_n_missing"], found["prompt_worst"]) == (2, 2, 0.1)

    def test_flat_scores_need_the_number_of_wordings(self):
        flat = [score for row in TABLE for score in row]
        assert PromptRobustness(num_wordings=11).compute(predictions=flat)["prompt_worst"] == pytest.approx(0.1)
        with pytest.raises(ValueError, match="num_wordings"):
            PromptRobustness().compute(predictions=flat)
        with pytest.raises(ValueError, match="do not divide"):
            PromptRobustness(num_wordings=4).compute(predictions=flat)

    def test_a_win_rate_over_cases_counts_each_case_once(self):
        found = WinRate().compute(predictions=[[1.0, 1.0, 1.0], [0.0, None, 0.0], [None, None, None]])
        assert (found["win_rate"], found["win_rate_n"], found["win_rate_n_missing"]) == (50, 2, 1)
        assert found["win_rate_standard_error"] == pytest.approx(100 * math.sqrt(0.5) / math.sqrt(2))

    def test_combine_takes_them_offline_and_leaves_no_files(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")

        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.chdir(tmp_path)
        cache = str(tmp_path / "cache")
        flat = PromptRobustness(num_wordings=2, cache_dir=cache)
        combined = evaluate.combine([WinRate(cache_dir=cache), flat, AttackSuccess(cache_dir=cache)])
        found = combined.compute(predictions=[1.0, 0.0, 0.5, 0.5], references=[0, 0, 0, 0])
        assert (found["win_rate"], found["prompt_gap"], found["attack_success"]) == (50, 0.5, 0.5)
        rows = evaluate.combine([WinRate(cache_dir=cache), PromptRobustness(cache_dir=cache)])
        rows.add_batch(predictions=[[1.0, 0.0]], references=[0])
        assert rows.compute(predictions=[[0.5, 0.5]], references=[1])["prompt_worst"] == 0.25
        assert os.listdir(tmp_path) == []
