import math
import os

import evaluate
import numpy as np
import pytest

from trl_robust.evaluation.metrics import AttackSuccess, attack_success, paired_difference


class TestAttackSuccess:
    def test_counts_mean_and_interval_of_plain_booleans(self):
        estimate = attack_success([True] * 30 + [False] * 70)
        assert estimate["success"] == pytest.approx(0.3)
        assert (estimate["n_scored"], estimate["n_errored"], estimate["n_skipped"]) == (100, 0, 0)
        low, high = estimate["interval"]
        # The normal approximation gives 0.30 +- 1.96 * sqrt(0.21 / 100) = [0.210, 0.390].
        assert low == pytest.approx(0.21, abs=0.015) and high == pytest.approx(0.39, abs=0.015)

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            # z = 1.959964, z^2 = 3.841459; Wilson's upper bound for 0 of 10 is 3.841459 / 13.841459 = 0.277533.
            ([False] * 10, [0.0, 0.277533]),
            ([True] * 10, [0.722467, 1.0]),
            ([False], [0.0, 0.793450]),  # 3.841459 / 4.841459
            ([0.5] * 10, [0.5 - 0.138766, 0.5 + 0.138766]),  # half of the unseen share towards either end
        ],
    )
    def test_without_spread_the_interval_is_wilsons(self, rows, expected):
        assert attack_success(rows)["interval"] == pytest.approx(expected, abs=1e-5)

    def test_confidence_moves_wilsons_bound(self):
        # z = 1.644854, z^2 = 2.705543; 2.705543 / 12.705543 = 0.212942.
        assert attack_success([0] * 10, confidence=0.9)["interval"] == pytest.approx([0, 0.212942], abs=1e-5)

    def test_the_interval_covers_a_binomial_about_as_often_as_it_says(self):
        generator = np.random.default_rng(7)
        covered = 0
        for sample in generator.random((400, 60)) < 0.35:
            low, high = attack_success(list(sample), num_resamples=500)["interval"]
            covered += low <= 0.35 <= high
        # 400 trials at 0.95 have a standard error of 0.011; the percentile interval is known to fall a little short.
        assert 0.91 <= covered / 400 <= 0.98

    def test_errored_and_skipped_rows_never_count_as_safe(self):
        rows = [{"success": True}, {"status": "errored", "success": False}, {"status": "skipped"}]
        estimate = attack_success(rows)
        assert estimate["success"] == 1.0
        assert (estimate["n_scored"], estimate["n_errored"], estimate["n_skipped"]) == (1, 1, 1)

    @pytest.mark.parametrize("rows", [[], [{"status": "errored"}], [{"status": "skipped", "success": False}]])
    def test_nothing_scored_gives_none_and_not_zero(self, rows):
        estimate = attack_success(rows)
        assert estimate["success"] is None and estimate["interval"] is None
        assert estimate["n_scored"] == 0

    def test_the_seed_settles_the_interval(self):
        rows = list(np.random.default_rng(0).random(40))
        assert attack_success(rows, seed=3) == attack_success(rows, seed=3)
        assert attack_success(rows, seed=3)["interval"] != attack_success(rows, seed=4)["interval"]

    def test_attempts_at_one_prompt_are_drawn_together(self):
        apart = [{"success": i < 10} for i in range(20) for _ in range(10)]
        together = [{"id": i, "success": i < 10} for i in range(20) for _ in range(10)]
        width = {}
        for name, rows in (("apart", apart), ("together", together)):
            estimate = attack_success(rows)
            assert estimate["success"] == 0.5 and estimate["n_scored"] == 200
            width[name] = estimate["interval"][1] - estimate["interval"][0]
        # Ten equal attempts carry the information of one: the standard error is sqrt(10) times as wide.
        assert width["together"] / width["apart"] == pytest.approx(math.sqrt(10), rel=0.15)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"status": "safe", "success": True}, "allowed are 'scored', 'errored', 'skipped'"),
            ({"status": None, "success": True}, "has status None"),
            ({"success": 1.2}, r"Rescale the judge's score to \[0, 1\]"),
            ({"success": -0.1}, "outside"),
            ({"success": float("nan")}, "set `status` to 'errored'"),
            ({"status": "scored"}, "has no `success`"),
            ({"success": None}, "has no `success`"),
            ({"success": "yes"}, "of type str"),
            (float("nan"), "outside"),
        ],
    )
    def test_a_wrong_row_is_refused_with_its_position_and_a_way_out(self, row, message):
        with pytest.raises(ValueError, match=message) as error:
            attack_success([True, row])
        assert "Row 1" in str(error.value)

    @pytest.mark.parametrize("settings", [{"confidence": 95}, {"confidence": 0}, {"num_resamples": 0}])
    def test_wrong_settings_are_refused(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            attack_success([True], **settings)


class TestPairedDifference:
    def test_pairs_by_id_in_any_order(self):
        before = [{"id": i, "success": i < 8} for i in range(10)]
        after = [{"id": i, "success": i < 2} for i in reversed(range(10))]
        result = paired_difference(before, after)
        assert result["difference"] == pytest.approx(-0.6)
        assert (result["success_a"], result["success_b"]) == (0.8, 0.2)
        assert result["n_paired"] == 10 and result["n_unpaired"] == 0
        assert -1 <= result["interval"][0] < -0.6 < result["interval"][1] < 0

    def test_is_narrower_than_unpaired_where_prompts_agree(self):
        before = [{"id": i, "success": i % 2 == 0} for i in range(40)]
        after = [{"id": i, "success": i % 2 == 0 and i > 3} for i in range(40)]
        low, high = paired_difference(before, after)["interval"]
        separate = attack_success(before)["interval"]
        assert high - low < separate[1] - separate[0]

    def test_prompts_scored_on_one_side_only_leave_both_sides(self):
        before = [{"id": "a", "success": 1}, {"id": "b", "success": 1}, {"id": "c", "status": "skipped"}]
        after = [{"id": "a", "success": 0}, {"id": "b", "status": "errored"}, {"id": "d", "success": 0}]
        result = paired_difference(before, after)
        assert result["n_paired"] == 1 and result["n_unpaired"] == 3
        assert result["success_a"] == 1 and result["success_b"] == 0

    def test_no_change_at_all_is_not_certainty(self):
        rows = [{"id": i, "success": i % 2} for i in range(10)]
        result = paired_difference(rows, rows)
        assert result["difference"] == 0
        assert result["interval"] == pytest.approx([-0.277533, 0.277533], abs=1e-5)

    def test_nothing_in_common_gives_none(self):
        result = paired_difference([{"id": 1, "success": 1}], [{"id": 2, "success": 1}])
        assert result["difference"] is None and result["interval"] is None and result["n_unpaired"] == 2

    def test_a_row_without_an_id_is_refused(self):
        with pytest.raises(ValueError, match="Row 0 of rows_b has no `id`"):
            paired_difference([{"id": 1, "success": 1}], [{"success": 1}])


class TestMetric:
    def test_returns_plain_floats_for_a_trainer(self):
        result = AttackSuccess().compute(predictions=[True, False])
        assert result["attack_success"] == 0.5 and result["attack_success_n"] == 2
        assert set(result) == {
            "attack_success",
            "attack_success_low",
            "attack_success_high",
            "attack_success_n",
            "attack_success_n_errored",
        }
        assert all(type(value) is float for value in result.values())

    def test_batches_and_single_values_add_up_to_the_function(self):
        metric = AttackSuccess()
        metric.add_batch(predictions=np.array([1.0, 0.0, 0.25]))
        metric.add(prediction=True)
        expected = attack_success([1.0, 0.0, 0.25, True])
        result = metric.compute()
        assert result["attack_success"] == expected["success"]
        assert [result["attack_success_low"], result["attack_success_high"]] == expected["interval"]
        # A second round starts from nothing.
        assert metric.compute(predictions=[0])["attack_success_n"] == 1

    @pytest.mark.parametrize("missing", [None, float("nan")])
    def test_a_value_that_is_missing_is_errored_and_not_safe(self, missing):
        result = AttackSuccess().compute(predictions=[1.0, missing])
        assert result["attack_success"] == 1.0
        assert result["attack_success_n"] == 1 and result["attack_success_n_errored"] == 1

    def test_nothing_scored_is_nan(self):
        assert math.isnan(AttackSuccess().compute(predictions=[float("nan")])["attack_success"])

    def test_a_value_outside_the_scale_is_refused(self):
        with pytest.raises(ValueError, match="outside"):
            AttackSuccess().compute(predictions=[0.5, 7.0])

    def test_the_confidence_can_be_set(self):
        result = AttackSuccess().compute(predictions=[0] * 10, confidence=0.9)
        assert result["attack_success_high"] == pytest.approx(0.212942, abs=1e-5)

    def test_combine_works_offline_and_leaves_no_files(self, tmp_path, monkeypatch):
        class Share(AttackSuccess):
            """A second metric with the same keys, so that `combine` has to prefix them."""

        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")

        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.chdir(tmp_path)
        cache = tmp_path / "cache"
        metrics = {"a": AttackSuccess(cache_dir=str(cache)), "b": Share(cache_dir=str(cache))}
        combined = evaluate.combine(metrics)
        combined.add_batch(predictions=[1, 0], references=[1, 1])
        result = combined.compute(predictions=[1, 1], references=[0, 0])
        assert result["a_attack_success"] == 0.75 and result["b_attack_success_n"] == 4
        assert os.listdir(tmp_path) == []
