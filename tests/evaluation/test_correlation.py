"""Rank statistics against values worked by hand, or taken once from SciPy 1.16 (`spearmanr`, `ttest_rel`, `t.sf`)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trl_robust.evaluation.correlation import (
    bootstrap,
    detectable,
    edit_distance,
    paired_test,
    power,
    ranks,
    shuffled_rhos,
    spearman,
    student_p,
)

X = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
Y = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]
Z = [1, 2, 2, 4, 5, 7, 3, 8, 6, 9]


def clustered(generator: np.random.Generator, num_clusters: int = 20, size: int = 10):
    """Pairs that are nearly the same within a cluster: ten times the rows, hardly more to learn from."""
    centres = generator.normal(size=(num_clusters, 1, 2)) + 0 * np.zeros((1, size, 1))
    pairs = (centres + 0.05 * generator.normal(size=(num_clusters, size, 2))).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.repeat(np.arange(num_clusters), size)


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([10, 20, 20, 5, 20]).tolist() == [2, 4, 4, 1, 4]


def test_spearman_without_ties_is_the_formula_of_squared_rank_differences():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    # Differences of ranks -1, 1, -1, 1, 0: rho = 1 - 6 * 4 / (5 * 24).
    assert spearman(x, y)["rho"] == pytest.approx(0.8, abs=1e-12)
    assert spearman(x, [-value for value in y])["rho"] == pytest.approx(-0.8, abs=1e-12)


def test_spearman_with_ties_and_its_p_are_the_librarys():
    found = spearman(X, Y)
    assert found["rho"] == pytest.approx(0.13471506281091267, abs=1e-12)
    assert found["p"] == pytest.approx(0.7106008805223829, abs=1e-10)
    assert found["interval"][0] < found["rho"] < found["interval"][1] and found["n"] == 10


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(0.0, 7, 1.0), (2.5, 7, 0.04099221858575289), (0.1, 1, 0.936548965138893), (12, 40, 7.82417130425598e-15)],
)
def test_student_p_is_the_librarys(t, degrees, p):
    assert student_p(t, degrees) == pytest.approx(p, rel=1e-9)
    assert student_p(-t, degrees) == student_p(t, degrees)


def test_the_papers_p_follows_from_its_rho_and_number_of_cases():
    # Figure 2 of 2503.01345, recomputed: 95 points, rho 0.362, p 3e-4.
    assert student_p(0.362 * np.sqrt(93 / (1 - 0.362**2)), 93) == pytest.approx(3.1e-4, abs=1e-5)


def test_the_partial_correlation_is_the_formula_for_one_control():
    found = spearman(X, Y, controls=[Z])
    # (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2)) of the ranks; p with n - 3 degrees of freedom.
    assert found["rho"] == pytest.approx(-0.32306311120659825, abs=1e-12)
    assert found["p"] == pytest.approx(0.3964480540402258, abs=1e-10)


def test_a_correlation_that_a_confounder_makes_vanishes_when_it_is_held_fixed():
    generator = np.random.default_rng(0)
    confounder = generator.normal(size=400)
    x, y = (confounder + 0.5 * generator.normal(size=400) for _ in range(2))
    assert spearman(x, y, resamples=10)["rho"] > 0.7
    held = spearman(x, y, controls=[confounder], resamples=200)
    assert abs(held["rho"]) < 0.1 and held["interval"][0] < 0 < held["interval"][1]


def test_a_true_correlation_is_found_within_its_interval():
    generator = np.random.default_rng(1)
    # Spearman of a bivariate normal is 6 / pi * asin(r / 2): 0.4826 for r = 0.5.
    pairs = generator.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=500)
    found = spearman(pairs[:, 0], pairs[:, 1], resamples=500)
    assert found["interval"][0] < 0.4826 < found["interval"][1]
    assert found["interval"][1] - found["interval"][0] < 0.2


def test_drawing_clusters_is_wider_than_drawing_rows_where_rows_of_a_cluster_are_alike():
    x, y, clusters = clustered(np.random.default_rng(3))
    naive, whole = spearman(x, y, resamples=300), spearman(x, y, clusters=clusters, resamples=300)
    width = [found["interval"][1] - found["interval"][0] for found in (naive, whole)]
    assert width[1] > 2 * width[0]
    assert whole["rho"] == naive["rho"] and whole["p"] is None


def test_clusters_of_one_row_are_rows():
    generator = np.random.default_rng(4)
    x, y = generator.normal(size=(2, 40))
    rows, single = spearman(x, y, resamples=500), spearman(x, y, clusters=range(40), resamples=500)
    assert single["interval"] == pytest.approx(rows["interval"])


@pytest.mark.parametrize(
    ("x", "y", "controls", "why"),
    [
        ([1, 1, 1, 1], [1, 2, 3, 4], [], "distance has one value"),
        ([1, 2, 3, 4], [1, 1, 1, 1], [], "drop has one value"),
        ([1, 2], [2, 1], [], "too few"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [[2, 1, 4, 3], [3, 1, 2, 4]], "too few"),
        ([1, 2, 3, 4, 5], [1, 3, 2, 4, 5], [[1, 2, 3, 4, 5]], "explain one side"),
        ([], [], [], "too few"),
    ],
)
def test_an_undefined_correlation_says_why_and_is_no_number(x, y, controls, why):
    found = spearman(x, y, controls=controls, names=("the distance", "the drop"), resamples=10)
    assert found["rho"] is None and found["p"] is None and why in found["why"]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="must be paired"):
        spearman([1, 2, 3], [1, 2])


def test_the_paired_tests_are_the_librarys_and_all_64_sign_flips():
    first, second = [5.1, 4.9, 6.2, 5.8, 6.0, 5.5], [4.8, 5.0, 5.6, 5.1, 5.9, 5.0]
    found = paired_test(first, second)
    assert found["difference"] == pytest.approx(0.35) and found["n"] == 6
    assert found["t"] == pytest.approx(2.781517949836592) and found["p"] == pytest.approx(0.03883229741814109)
    differences = np.array(first) - np.array(second)
    flips = np.array([abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=6)])
    exact = np.mean(flips >= abs(differences.mean()) - 1e-12)
    assert found["p_sign_flip"] == pytest.approx(exact, abs=0.01)


def test_a_pair_that_lacks_a_value_is_left_out_of_the_paired_test():
    assert paired_test([1.0, 2.0, 4.0], [0.0, np.nan, 2.0])["n"] == 2
    assert paired_test([1.0], [np.nan]) == dict.fromkeys(("difference", "interval", "t", "p", "p_sign_flip")) | {
        "n": 0
    }


def test_exchanged_values_have_no_correlation_on_average():
    x = np.arange(50.0)
    null = shuffled_rhos(x, x, size=2000)
    assert abs(null.mean()) < 0.01
    # Its variance is 1 / (n - 1), whatever the values are.
    assert null.std() == pytest.approx(1 / 7, rel=0.05)


def test_the_bootstrap_of_a_mean_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(5).normal(size=100)
    low, high = bootstrap(lambda rows: values[rows].mean(), 100, size=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)


def test_power_and_the_smallest_correlation_that_can_be_found_agree():
    assert power(detectable(100), 100) == pytest.approx(0.8, abs=1e-3)
    assert detectable(100) == pytest.approx(0.285, abs=1e-3)
    assert power(0.362, 95) > 0.9 > 0.4 > power(0.362, 20)
    assert power(0.3, 4) is None and detectable(4) is None


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0), (["a", "b"], ["b", "a"], 2)],
)
def test_the_edit_distance_is_levenshteins(first, second, distance):
    assert edit_distance(first, second) == distance
