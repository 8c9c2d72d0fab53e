import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.data import DataError
from trl_robust.data.hashing import row_hashes
from trl_robust.selection import Selector
from trl_robust.selection.baselines import none_selector, random_selector
from trl_robust.selection.statistics import auroc, effective_fraction, jaccard, precision_at, ranks, spearman
from trl_robust.selection.summary import summarize

few = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=25)


def rows(count=10):
    return Dataset.from_dict(
        {
            "prompt": [f"question {number}" for number in range(count)],
            "completion": [[{"role": "assistant", "content": f"answer {number}"}] for number in range(count)],
            "unsafe": [number >= 8 for number in range(count)],
            "source": ["web" if number % 2 else "book" for number in range(count)],
        }
    )


def ranked(count=10, **statistics):
    """Row 0 comes first; the scores are 0, -0.1, ... for 10 rows."""
    values = {name: torch.as_tensor(value) for name, value in statistics.items()}
    logits = -torch.arange(count, dtype=torch.float64) / count
    return Selector(logits, row_hashes(rows(count)), statistics=values, settings={"method": "seal"})


def summary(selector=None, kept=range(8), data=None, **options):
    found = summarize(selector or ranked(), rows() if data is None else data, list(kept), **options)
    json.dumps(found, allow_nan=False)
    return found


class TestStatistics:
    @given(few)
    def test_auroc_is_mann_and_whitneys_statistic(self, pairs):
        scores, labelled = np.array([score for score, _ in pairs], float), np.array([label for _, label in pairs])
        wins = [(one > other) + (one == other) / 2 for one in scores[~labelled] for other in scores[labelled]]
        assert auroc(scores, labelled) == (pytest.approx(np.mean(wins), abs=1e-12) if wins else None)

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
    def test_spearman_is_pearsons_correlation_of_mean_ranks(self, pairs):
        x, y = np.array(pairs, float).T

        def mean_ranks(values):
            return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

        assert ranks(x).tolist() == mean_ranks(x).tolist()
        if x.min() == x.max() or y.min() == y.max():
            assert spearman(x, y) is None
        else:
            assert spearman(x, y) == pytest.approx(np.corrcoef(mean_ranks(x), mean_ranks(y))[0, 1], abs=1e-12)

    def test_spearman_without_ties_is_one_minus_six_sums(self):
        x, y = (
            np.array([86, 97, 99, 100, 101, 103, 106, 110, 112, 113]),
            np.array([2, 20, 28, 27, 50, 29, 7, 17, 6, 12]),
        )
        assert spearman(x, y) == pytest.approx(1 - 6 * 194 / (10 * 99), abs=1e-12)
        assert spearman(np.arange(5.0), np.arange(5.0) ** 3) == 1.0
        assert spearman(np.array([1.0]), np.array([1.0])) is None

    @given(few, st.data())
    def test_precision_is_the_mean_over_all_orders_of_tied_rows(self, pairs, data):
        scores, labelled = np.array([score for score, _ in pairs], float), np.array([label for _, label in pairs])
        k = data.draw(st.integers(1, len(pairs)))
        found = precision_at(scores, labelled, k)
        assert 0 <= found <= 1
        order = np.random.default_rng(0).permutation(len(pairs))
        assert precision_at(scores[order], labelled[order], k) == pytest.approx(found, abs=1e-12)
        if len(set(scores)) == len(scores):
            first = np.argsort(-scores)[:k]
            assert found == pytest.approx((~labelled[first]).mean(), abs=1e-12)

    def test_precision_shares_ties_evenly(self):
        labelled = np.array([False, True, False, True])
        assert precision_at(np.zeros(4), labelled, 1) == 0.5
        assert precision_at(np.array([3.0, 2, 2, 2]), labelled, 2) == pytest.approx((1 + 1 / 3) / 2)
        assert precision_at(np.zeros(4), labelled, 0) is None

    def test_jaccard(self):
        assert jaccard([1, 2, 3], {2, 3, 4}) == 0.5
        assert jaccard([], []) is None and jaccard([], [1]) == 0.0

    @pytest.mark.parametrize(
        ("weights", "share"), [([1, 1, 1, 1], 1), ([4, 0, 0, 0], 0.25), ([3, 1], 0.8), ([1e-200, 1e-200], 1)]
    )
    def test_effective_fraction(self, weights, share):
        assert effective_fraction(np.array(weights, float)) == pytest.approx(share, rel=1e-12)
        assert effective_fraction(np.zeros(3)) is None and effective_fraction(np.zeros(0)) is None


class TestSummary:
    def test_counts_and_threshold_are_those_of_the_selection(self):
        selector = ranked()
        chosen = selector.selection(rows(), 0.8)
        found = summary(selector, chosen.kept)
        assert found["rows"] == {
            "dataset": 10, "scored": 10, "unknown": 0, "unvisited": 0, "missing": 0, "kept": 8,
            "kept_without_score": 0,
        }  # fmt: skip
        assert (found["threshold"], found["tied"]) == (pytest.approx(chosen.threshold), chosen.tied)
        assert found["threshold_score"] == pytest.approx(-0.7 + 0.45) and found["mean_score"] == pytest.approx(-0.45)
        assert (found["schema"], found["method"], found["warnings"]) == (1, "seal", [])

    def test_label_and_source_numbers(self):
        found = summary(kept=range(9), label_column="unsafe", source_column="source")
        assert found["labels"] == {
            "column": "unsafe", "labelled": 2, "unlabelled": 8, "auroc": 1.0, "kept_labelled": 1,
            "kept_labelled_share": 0.5, "precision_kept": 8 / 9, "precision_all": 0.8,
            "precision_at": [{"share": share, "k": k, "precision": 1.0} for share, k in
                             ((0.1, 1), (0.2, 2), (0.4, 4), (0.6, 6), (0.8, 8))],
        }  # fmt: skip
        weights = ranked().weights().tolist()
        assert found["sources"] == {
            "book": {"rows": 5, "kept": 5, "keep_rate": 1.0, "mean_weight": pytest.approx(np.mean(weights[::2])),
                     "labelled": 1, "kept_labelled": 1},
            "web": {"rows": 5, "kept": 4, "keep_rate": 0.8, "mean_weight": pytest.approx(np.mean(weights[1::2])),
                    "labelled": 1, "kept_labelled": 0},
        }  # fmt: skip
        assert list(found["sources"]) == ["book", "web"]

    def test_a_ranking_the_wrong_way_round_has_auroc_0_and_no_ranking_a_half(self):
        upside_down = Selector(-ranked().logits, row_hashes(rows()))
        assert summary(upside_down, label_column="unsafe")["labels"]["auroc"] == 0.0
        found = summary(none_selector(row_hashes(rows())), label_column="unsafe")
        assert found["labels"]["auroc"] == 0.5
        assert [each["precision"] for each in found["labels"]["precision_at"]] == [pytest.approx(0.8)] * 5

    def test_the_histograms_hold_every_row(self):
        found = summary(label_column="unsafe")
        for name, values in (("score", ranked().logits + 0.45), ("weight", ranked().weights())):
            histogram = found["histograms"][name]
            assert [sum(histogram["counts"][group]) for group in ("all", "kept", "labelled")] == [10, 8, 2]
            assert histogram["edges"][0] == pytest.approx(values.min().item())
            assert histogram["edges"][-1] == pytest.approx(values.max().item())
            assert histogram["counts"]["labelled"][0] >= 1  # row 9 has the lowest of both
        even = summary(none_selector(row_hashes(rows())))["histograms"]["weight"]
        assert even == {"edges": [0.5, 1.5], "counts": {"all": [10], "kept": [8]}}
        assert summary()["effective_fraction"]["all"] == pytest.approx(effective_fraction(ranked().weights().numpy()))

    def test_visits_are_counted(self):
        found = summary(ranked(visits=[2] * 7 + [3] * 2 + [5]))["visits"]
        assert found == {
            "min": 2, "max": 5, "mean": 2.5, "width": 1, "counts": [[2, 7], [3, 2], [4, 0], [5, 1]],
        }  # fmt: skip
        many = summary(ranked(visits=[1] * 9 + [100]))["visits"]
        assert many["width"] == 4 and many["counts"][0] == [1, 9] and many["counts"][-1] == [97, 1]
        assert sum(count for _, count in many["counts"]) == 10 and summary()["visits"] is None

    def test_rows_without_a_score_are_counted_and_in_nothing_else(self):
        data = Dataset.from_list([*rows().to_list(), {**rows()[0], "prompt": "new"}])
        selector = ranked(visits=[1] * 9 + [0])
        found = summary(selector, [0, 1, 10], data, label_column="unsafe")
        assert found["rows"] == {
            "dataset": 11, "scored": 9, "unknown": 1, "unvisited": 1, "missing": 0, "kept": 3, "kept_without_score": 1,
        }  # fmt: skip
        assert sum(found["histograms"]["score"]["counts"]["all"]) == 9
        assert 10 not in {each["row"] for each in found["examples"]["bottom"]}
        assert "2 of 11 rows have no score (1 were not in the selector's training, 1 were never visited)" in str(
            found["warnings"]
        )

    def test_nothing_that_is_known_is_still_a_summary(self):
        other = Selector(torch.zeros(1), ["0" * 64])
        found = summary(other, [], label_column="unsafe", source_column="source", others={"same": other})
        assert found["threshold"] is None and found["histograms"] == {"score": None, "weight": None}
        assert found["rows"]["missing"] == 1 and found["labels"]["auroc"] is None
        assert found["examples"] == {"top": [], "borderline": [], "bottom": []}
        assert found["agreement"]["same"]["why"] == "fewer than two rows"

    def test_examples(self):
        examples = summary(label_column="unsafe", source_column="source", examples=4)["examples"]
        assert {name: [each["row"] for each in found] for name, found in examples.items()} == {
            "top": [0, 1, 2, 3], "borderline": [6, 7, 8, 9], "bottom": [9, 8, 7, 6],
        }  # fmt: skip
        assert [each["kept"] for each in examples["borderline"]] == [True, True, False, False]
        last = examples["bottom"][0]
        assert last["hash"] == row_hashes(rows())[9] and last["copies"] == 1
        assert last["score"] == pytest.approx(-0.45) and last["weight"] == pytest.approx(ranked().weights()[9].item())
        assert (last["label"], last["source"], last["kept"]) == (True, "web", False)
        assert last["text"] == {
            "prompt": "question 9", "completion": [{"role": "assistant", "content": "answer 9"}],
        }  # fmt: skip
        assert summary(examples=0)["examples"] == {"top": [], "borderline": [], "bottom": []}

    def test_identical_rows_are_shown_once(self):
        data = rows().select([0, 0, 0, *range(1, 10)])
        selector = Selector(-torch.arange(12.0), row_hashes(data))
        top = summary(selector, data=data, examples=2)["examples"]["top"]
        assert [(each["row"], each["copies"]) for each in top] == [(0, 3), (3, 1)]

    def test_each_of_two_identical_rows_has_its_own_statistics(self):
        data = rows().select([0, 0, *range(1, 10)])
        length = torch.arange(11)
        selector = Selector(-torch.arange(11.0), row_hashes(data), statistics={"length": length})
        scores = selector.scores.numpy()
        found = summary(selector, data=data)["correlations"]["length"]
        assert found["rho"] == spearman(scores, length.numpy()) and found["n"] == 11

    def test_another_order_of_the_rows_gives_the_same_numbers(self):
        selector = ranked(visits=[1, 2] * 5, length=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
        order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
        one = summary(selector, label_column="unsafe", source_column="source")
        kept = [place for place, number in enumerate(order) if number < 8]
        other = summary(selector, kept, rows().select(order), label_column="unsafe", source_column="source")
        for name in ("rows", "threshold", "histograms", "visits", "correlations", "labels"):
            assert one[name] == other[name], name
        assert {name: each["kept"] for name, each in one["sources"].items()} == {
            name: each["kept"] for name, each in other["sources"].items()
        }

    def test_identities_of_the_settings_become_plain_values(self):
        selector = ranked()
        selector.settings |= {"path": __import__("pathlib").Path("a"), "rate": float("inf"), "steps": (1, 2)}
        assert summary(selector)["settings"] == {"method": "seal", "path": "a", "rate": None, "steps": [1, 2]}

    @pytest.mark.parametrize("value", [None, "no", 2, 0.5])
    def test_refuses_a_label_that_is_neither_true_nor_false(self, value):
        data = (
            rows()
            .remove_columns("unsafe")
            .add_column("unsafe", [*[type(value)() if value is not None else 0] * 9, value])
        )
        with pytest.raises(DataError, match="label `unsafe` is neither true nor false"):
            summary(data=data, label_column="unsafe")

    def test_refuses_what_is_not_there(self):
        with pytest.raises(DataError, match="no column 'bad'; it has"):
            summary(label_column="bad")
        with pytest.raises(DataError, match="no column 'where'"):
            summary(source_column="where")
        with pytest.raises(ValueError, match="`kept` names row 10; the dataset has 10 rows"):
            summary(kept=[3, 10])


class TestCorrelations:
    def test_each_is_spearmans_rho_over_the_rows_that_have_the_value(self):
        loss = [0.3, 0.2, float("nan"), 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
        found = summary(ranked(visits=[1] * 10, last_visit_step=list(range(10)), first_loss=loss, length=[7] * 10))[
            "correlations"
        ]
        assert found["last_visit_step"] == {"rho": pytest.approx(-1.0), "n": 10, "why": None}
        # Nine ranks, of which the first two are exchanged: 1 - 6 * 2 / (9 * 80).
        assert found["first_loss"] == {"rho": pytest.approx(-(1 - 12 / 720)), "n": 9, "why": None}
        assert found["length"] == {"rho": None, "n": 10, "why": "the other is the same in every row"}
        assert summary()["correlations"]["length"] is None
        even = summary(none_selector(row_hashes(rows())))["correlations"]["visits"]
        assert even["rho"] is None and even["why"] == "all scores are equal"

    @pytest.mark.parametrize(
        ("statistic", "advice"),
        [("last_visit_step", "`selector_optimizer: sgd` and without `selector_average`"), ("visits", "whole epochs")],
    )
    def test_visit_time_is_warned_of_above_a_tenth(self, statistic, advice):
        # 1000 rows: chance reaches 0.06. A share of the rows is sorted, the others are in an order of no meaning.
        count, rng = 1000, np.random.default_rng(0)
        warned = {}
        for sorted_rows in (0, 700):
            step = np.concatenate([np.arange(sorted_rows), sorted_rows + rng.permutation(count - sorted_rows)]) + 1
            found = summary(ranked(count, **{statistic: step}), data=rows(count))
            rho = found["correlations"][statistic]["rho"]
            warned[abs(rho) > 0.1] = found["warnings"]
        assert warned[False] == []
        (warning,) = warned[True]
        assert advice in warning and "chance" not in warning

    def test_a_warning_says_where_it_may_be_chance(self):
        # Ranks of the scores fall from 10 to 1; rho is 1 - 6 * 132 / 990 = 0.2, and 1.96 / 3 is what chance reaches.
        found = summary(ranked(last_visit_step=[4, 9, 5, 3, 8, 6, 7, 0, 1, 2][::-1]))
        rho = found["correlations"]["last_visit_step"]["rho"]
        (warning,) = found["warnings"]
        assert f"(Spearman's rho {rho:.2f})" in warning
        assert "(With 10 rows chance alone reaches 0.65; another seed would tell.)" in warning

    def test_weights_that_rest_on_a_few_rows_are_warned_of(self):
        logits = torch.zeros(100)
        logits[0] = 50
        selector = Selector(logits, row_hashes(rows(100)))
        found = summary(selector, data=rows(100))
        assert found["effective_fraction"]["all"] == pytest.approx(0.01)
        (warning,) = found["warnings"]
        assert "The weights amount to 0.01 of the rows" in warning and "learning_rate" not in warning
        selector.settings["method"] = "seal"
        assert "lower `selector_learning_rate`" in str(summary(selector, data=rows(100))["warnings"])


class TestAgreement:
    def test_rows_are_matched_by_what_they_say(self):
        order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
        other = Selector(ranked().logits[order], row_hashes(rows().select(order)))
        found = summary(source_column="source", others={"other": other})
        assert found["agreement"]["other"] == {
            "method": None, "n": 10, "rho": pytest.approx(1.0), "why": None,
            "within_source": {"book": {"rho": pytest.approx(1.0), "n": 5}, "web": {"rho": pytest.approx(1.0), "n": 5}},
            "jaccard": 1.0, "jaccard_by_chance": pytest.approx(6.4 / 9.6), "flagged": False,
        }  # fmt: skip
        assert found["warnings"] == []

    def test_disagreement_is_flagged(self):
        # Exchanged within neighbours of a source: alike over all rows.
        upside_down = Selector(-ranked().logits, row_hashes(rows()))
        found = summary(kept=range(5), others={"turned": upside_down})
        agreement = found["agreement"]["turned"]
        assert agreement["rho"] == pytest.approx(-1.0) and agreement["jaccard"] == 0.0 and agreement["flagged"]
        assert "turned ranks the rows otherwise (Spearman's rho -1.00, below 0.5)" in str(found["warnings"])

    def test_agreement_over_all_rows_may_hide_disagreement_within_sources(self):
        # Both put the books first; within them, and within the web, one is the other turned round.
        books = [number % 2 == 0 for number in range(10)]
        one = Selector(torch.tensor([100.0 * book - n for n, book in enumerate(books)]), row_hashes(rows()))
        other = Selector(torch.tensor([100.0 * book + n for n, book in enumerate(books)]), row_hashes(rows()))
        agreement = summary(one, source_column="source", others={"other": other})["agreement"]["other"]
        assert agreement["rho"] == pytest.approx(1 - 6 * 2 * (16 + 4 + 0 + 4 + 16) / 990)
        assert {each["rho"] for each in agreement["within_source"].values()} == {-1.0}

    def test_it_is_over_rows_that_both_have_scored(self):
        other = Selector(-torch.arange(4.0), row_hashes(rows())[6:])
        found = summary(others={"part": other})
        assert found["agreement"]["part"]["n"] == 4 and found["agreement"]["part"]["jaccard"] == 1.0
        assert "part has scored only 4 of the 10 rows" in str(found["warnings"])

    def test_chance_is_not_warned_of(self):
        found = summary(others={"random": random_selector(row_hashes(rows()), 1)})
        assert found["warnings"] == [] and found["agreement"]["random"]["method"] == "random"
