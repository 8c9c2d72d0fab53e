import json
import math
import pickle
import random

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.data import DataError, as_conversation, row_hashes
from trl_robust.selection import Selector, row_weights
from trl_robust.selection.matching import amount_kept

FUNCTIONS = ("softmax", "sigmoid", "relu", "tanh")
STATISTICS = {
    "visits": torch.tensor([3, 1, 2]),
    "last_visit_step": torch.tensor([8, 0, 5]),
    "first_loss": torch.tensor([1.5, 0.1, 1 / 3], dtype=torch.float64),
    "ema_loss": torch.tensor([float("nan"), 0.1, 1e-300], dtype=torch.float64),
    "length": torch.tensor([7, 7, 1]),
}


def dataset(texts, **columns):
    return Dataset.from_dict({"prompt": [f"say {text}" for text in texts], "completion": list(texts), **columns})


def scored(scores, **options):
    """Rows `0`, `1`, ... and a selector with these scores."""
    rows = dataset([str(number) for number in range(len(scores))])
    return rows, Selector(torch.tensor(scores, dtype=torch.float64), row_hashes(rows), **options)


def said(rows):
    return rows["completion"][:]


class TestOrder:
    def test_the_best_are_kept_in_the_datasets_own_order(self):
        rows, selector = scored([0.1, 0.9, 0.5, 0.7, 0.3])
        assert said(selector.select(rows, 0.6)) == ["1", "2", "3"]
        assert said(selector.select(rows.select([4, 3, 2, 1, 0]), 0.6)) == ["3", "2", "1"]

    def test_of_ties_the_smaller_hash_is_kept_and_of_identical_rows_the_earlier(self):
        rows, selector = scored([1.0] * 6)
        by_hash = sorted(range(6), key=row_hashes(rows).__getitem__)
        assert selector.selection(rows, count=2).kept == sorted(by_hash[:2])
        twice = dataset(["a", "b", "a", "a"], nth=[0, 1, 2, 3])
        same = Selector(torch.tensor([1.0, -9.0, 1.0, 1.0]), row_hashes(twice))
        assert same.selection(twice, count=2).kept == [0, 2]
        assert same.selection(twice.select([3, 2, 1, 0]), count=1).kept == [0]

    def test_identical_rows_have_the_mean_of_their_scores(self):
        rows = dataset(["a", "b", "a", "c"])
        selector = Selector(torch.tensor([4.0, 2.0, 1.0, 3.0]), row_hashes(rows))
        assert selector.scores.tolist() == [2.5, 2.0, 2.5, 3.0]
        assert said(selector.select(rows, count=1)) == ["c"]
        # A copy that the selector never saw as such has that score too.
        assert said(selector.select(dataset(["b", "a", "a", "a"]), count=3)) == ["a", "a", "a"]

    @given(st.data())
    def test_any_order_part_and_copy_of_the_rows_ranks_them_alike(self, data):
        texts = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14))
        scores = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=len(texts), max_size=len(texts)))
        rows = dataset(texts, nth=list(range(len(texts))))
        selector = Selector(torch.tensor(scores), row_hashes(rows))
        count = data.draw(st.integers(0, len(texts)))
        kept = sorted(said(selector.select(rows, count=count)))
        assert len(kept) == count
        order = data.draw(st.permutations(range(len(texts))))
        shuffled = rows.select(order)
        chosen = selector.selection(shuffled, count=count)
        assert sorted(said(shuffled.select(chosen.kept))) == kept
        assert chosen.kept == sorted(chosen.kept)
        # A selector whose own rows stood in another order. (Means of these scores are exact in any order.)
        moved = Selector(torch.tensor(scores)[order], row_hashes(shuffled))
        assert sorted(said(moved.select(rows, count=count))) == kept
        assert selector.selection(as_conversation(shuffled), count=count) == chosen

    def test_a_row_that_changed_is_no_longer_known_and_moves_no_other(self):
        scores = [math.sin(3 * number) for number in range(40)]
        rows, selector = scored(scores)
        kept = set(said(selector.select(rows, count=12)))
        assert kept == {str(n) for n in sorted(range(40), key=lambda n: -scores[n])[:12]}
        gone = next(iter(sorted(kept)))
        texts = ["something else" if text == gone else text for text in said(rows)]
        random.Random(0).shuffle(texts)
        changed = dataset(["new first", *texts])
        with pytest.raises(DataError, match="2 of its 41 rows were not scored"):
            selector.select(changed)
        assert set(said(selector.select(changed, count=11, unscored="drop"))) == kept - {gone}
        assert selector.selection(changed, count=11, unscored="drop").missing == 1

    def test_a_plain_file_and_a_conversation_with_other_columns_keep_the_same_rows(self):
        rows, selector = scored([0.1, 0.9, 0.5, 0.7, 0.3])
        talk = as_conversation(rows).add_column("source", list("abcde"))
        assert selector.selection(talk, 0.4).kept == selector.selection(rows, 0.4).kept == [1, 3]
        assert selector.select(talk, 0.4)["source"][:] == ["b", "d"]


class TestAmount:
    @pytest.mark.parametrize(("share", "rows", "kept"), [(0.29, 100, 29), (0.57, 100, 57), (0.8, 7, 5), (0.0, 9, 0)])
    def test_a_share_is_rounded_down_and_not_by_floating_point(self, share, rows, kept):
        data, selector = scored([float(number % 7) for number in range(rows)])
        assert len(selector.selection(data, share).kept) == kept

    @given(st.integers(1, 400), st.data())
    def test_a_share_that_is_a_whole_number_of_rows_keeps_them(self, rows, data):
        wanted = data.draw(st.integers(0, rows))
        assert amount_kept(wanted / rows, None, rows) == wanted
        assert amount_kept(max(0.0, (wanted - 0.01) / rows), None, rows) == max(0, wanted - 1)

    def test_the_whole_share_changes_nothing(self):
        rows, selector = scored([3.0, 1.0, 1.0, 2.0])
        kept = selector.select(rows, 1.0)
        assert kept.to_dict() == rows.to_dict() and kept.features == rows.features

    def test_a_count_keeps_so_many_and_at_most_all(self):
        rows, selector = scored([3.0, 1.0, 4.0, 2.0])
        assert selector.selection(rows, count=2).kept == [0, 2]
        assert selector.selection(rows, count=0).kept == []
        assert selector.selection(rows, count=9).kept == [0, 1, 2, 3]

    def test_a_threshold_keeps_every_row_of_at_least_that_weight(self):
        rows, selector = scored([0.5, 1.0, 1.5, 1.0], function="relu")
        assert selector.weights().tolist() == [0.5, 1.0, 1.5, 1.0]
        assert selector.selection(rows, threshold=1.0).kept == [1, 2, 3]
        assert selector.selection(rows, threshold=1.01).kept == [2]
        assert selector.selection(rows, threshold=2.0).threshold is None

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_the_threshold_that_is_told_keeps_the_same_rows_and_their_ties(self, function):
        rows, selector = scored([0.3, 0.9, 0.3, 0.7, 0.1], function=function)
        chosen = selector.selection(rows, count=3)
        assert chosen.tied == 2
        assert chosen.threshold == selector.weights()[0]
        assert selector.selection(rows, threshold=chosen.threshold).kept == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("amount", "message"),
        [
            ({"keep": 1.2}, "`keep` is 1.2; it is a share, from 0 to 1"),
            ({"keep": float("nan")}, "`keep` is nan"),
            ({"count": -1}, "`count` is -1"),
            ({"threshold": float("nan")}, "`threshold` is nan"),
            ({"count": 1, "threshold": 1.0}, "`count` and `threshold` are both given"),
            ({"unscored": "ignore"}, "`unscored` is 'ignore'; it is one of"),
        ],
    )
    def test_amounts_that_cannot_be_are_refused(self, amount, message):
        rows, selector = scored([1.0, 2.0])
        with pytest.raises(ValueError, match=message):
            selector.selection(rows, **amount)


class TestSources:
    def test_every_source_gives_the_same_share(self):
        rows, selector = scored([float(number) for number in range(10)])
        rows = rows.add_column("source", list("aaaaaabbbb"))
        assert selector.selection(rows, 0.5).kept == [5, 6, 7, 8, 9]
        assert selector.selection(rows, 0.5, source_column="source").kept == [3, 4, 5, 8, 9]
        chosen = selector.selection(rows, count=1, source_column="source")
        assert chosen.kept == [5, 9]
        assert chosen.threshold == selector.weights()[5]

    def test_an_unknown_column_is_refused(self):
        rows, selector = scored([1.0, 2.0])
        with pytest.raises(DataError, match="no column 'origin' to select by; it has"):
            selector.select(rows, source_column="origin")


class TestUnscored:
    def unscored(self):
        rows, _ = scored([0.0] * 4)
        selector = Selector(
            torch.tensor([4.0, 3.0, 2.0, 1.0]), row_hashes(rows), statistics={"visits": torch.tensor([1, 0, 2, 1])}
        )
        return dataset(["0", "new", "1", "2", "other", "3"]), selector

    def test_they_are_refused_by_number(self):
        rows, selector = self.unscored()
        with pytest.raises(DataError) as error:
            selector.select(rows)
        assert "2 of its 6 rows were not scored by this selector (2 rows (1, 4))" in str(error.value)
        assert "1 were never visited in its training (row 2)" in str(error.value)

    def test_they_are_dropped_or_kept_on_request_and_the_share_is_of_the_others(self):
        rows, selector = self.unscored()
        dropped = selector.selection(rows, 0.67, unscored="drop")
        assert dropped.kept == [0, 3]
        assert (dropped.unknown, dropped.unvisited, dropped.missing) == ([1, 4], [2], 0)
        assert selector.selection(rows, 0.67, unscored="keep").kept == [0, 1, 2, 3, 4]
        assert selector.selection(rows, 1.0, unscored="keep").kept == [0, 1, 2, 3, 4, 5]

    def test_many_are_named_by_the_first(self):
        _, selector = scored([1.0])
        with pytest.raises(DataError, match=r"30 of its 30 rows .* \(30 rows \(0, 1, 2, 3, 4, \.\.\.\)\)"):
            selector.select(dataset([f"new {number}" for number in range(30)]))

    def test_a_visited_copy_stands_for_its_twin(self):
        rows = dataset(["a", "a", "b"])
        visits = {"visits": torch.tensor([0, 1, 1])}
        assert Selector(torch.ones(3), row_hashes(rows), statistics=visits).selection(rows, 1.0).kept == [0, 1, 2]

    def test_rows_that_the_dataset_lacks_are_counted(self):
        rows, selector = scored([1.0, 2.0, 3.0])
        assert selector.selection(rows.select([1]), 1.0).missing == 2


class TestWeights:
    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_they_have_a_mean_of_1_and_stand_beside_the_rows_that_are_kept(self, function):
        rows, selector = scored([0.5, -0.5, 1.5, 0.25], function=function)
        weights = selector.weights()
        assert weights.dtype == torch.float64
        assert weights.mean().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(weights, row_weights(selector.logits, function, normalized=True))
        kept = selector.select(rows, count=3, weighted=True)
        assert said(kept) == ["0", "2", "3"]
        expected = weights[[0, 2, 3]] / weights[[0, 2, 3]].mean()
        torch.testing.assert_close(torch.tensor(kept["weight"][:], dtype=torch.float64), expected)

    def test_a_row_without_a_score_weighs_as_much_as_the_mean_of_those_with_one(self):
        _, selector = scored([1.0, 3.0], function="relu")
        kept = selector.select(dataset(["new", "0", "1"]), 1.0, weighted=True, unscored="keep")
        assert kept["weight"][:] == [1.0, 0.5, 1.5]

    def test_weights_that_cannot_be_written_are_refused(self):
        rows, selector = scored([0.0, 3.0], function="relu")
        with pytest.raises(DataError, match="has a column `weight` already"):
            selector.select(rows.add_column("weight", [1.0, 1.0]), weighted=True)
        with pytest.raises(DataError, match="has a weight of 0; nothing would be trained"):
            selector.select(rows.select([0]), 1.0, weighted=True)

    def test_a_raw_tanh_is_refused_with_the_reason(self):
        for name in ("raw_tanh", "tanh-raw"):
            with pytest.raises(ValueError, match=r"gradient ascent, .* no lower bound\. Use `tanh`"):
                scored([1.0], function=name)
        with pytest.raises(ValueError, match="is 'cosine'; it is one of"):
            scored([1.0], function="cosine")


class TestConstruction:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_score_that_is_no_number_is_refused_with_its_row(self, value):
        with pytest.raises(ValueError, match=r"not a finite number in 2 rows \(1, 3\)"):
            scored([1.0, value, 1.0, value])

    def test_numbers_of_rows_that_differ_are_refused(self):
        with pytest.raises(ValueError, match="2 logits has 1 row hashes"):
            Selector(torch.ones(2), ["a"])
        with pytest.raises(ValueError, match=r"statistics of other lengths: {'visits': 3}"):
            Selector(torch.ones(2), ["a", "b"], statistics={"visits": torch.ones(3)})
        for logits in (torch.ones(2, 1), torch.ones(0), torch.tensor(1.0)):
            with pytest.raises(ValueError, match="one logit a row, and at least one"):
                Selector(logits, ["a", "b"])

    def test_logits_of_a_training_are_taken_off_its_graph(self):
        logits = torch.ones(2, requires_grad=True)
        selector = Selector(logits, ["a", "b"])
        assert not selector.logits.requires_grad and selector.logits.dtype == torch.float64

    def test_the_fingerprint_is_of_the_rows_in_whatever_order(self):
        made = [Selector(torch.ones(2), names).fingerprint for names in (["a", "b"], ["b", "a"], ["a", "a"])]
        assert made[0] == made[1] != made[2]


class TestFiles:
    @pytest.mark.parametrize("normalized", [True, False])
    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_a_round_trip_is_exact(self, function, normalized, tmp_path):
        rows, selector = scored([0.1, 1 / 3, -1e-17], function=function, normalized=normalized, statistics=STATISTICS)
        selector.settings = {"method": "seal", "penalty_strength": 0.1, "name": "å", "list": [1, None]}
        selector.save(tmp_path / "a" / "b")
        loaded = Selector.load(tmp_path / "a" / "b")
        assert loaded.logits.equal(selector.logits)
        assert (loaded.row_hashes, loaded.function) == (selector.row_hashes, function)
        assert (loaded.normalized, loaded.settings) == (normalized, selector.settings)
        assert loaded.statistics.keys() == STATISTICS.keys()
        for name, values in STATISTICS.items():
            assert loaded.statistics[name].dtype == values.dtype
            torch.testing.assert_close(loaded.statistics[name], values, rtol=0, atol=0, equal_nan=True)
        assert loaded.weights().equal(selector.weights())
        assert loaded.selection(rows, 0.7) == selector.selection(rows, 0.7)
        assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
            "rows.parquet",
            "selector.json",
            "selector.safetensors",
        ]
        assert len({path.stat().st_mode for path in (tmp_path / "a" / "b").iterdir()}) == 1

    def test_the_files_say_what_they_hold(self, tmp_path):
        rows, selector = scored([0.5, 1.5, 1.0], function="relu", statistics=STATISTICS)
        selector.save(tmp_path)
        about = json.loads((tmp_path / "selector.json").read_text())
        assert about == {
            "schema": 1,
            "function": "relu",
            "normalized": True,
            "rows": 3,
            "dataset_fingerprint": selector.fingerprint,
            "rows_file": "rows.parquet",
            "settings": {},
        }
        table = pq.read_table(tmp_path / "rows.parquet").to_pydict()
        assert table["row"] == [0, 1, 2] and table["hash"] == row_hashes(rows)
        assert table["score"] == table["weight"] == [0.5, 1.5, 1.0]
        assert table["visits"] == [3, 1, 2]

    def test_nothing_is_pickled_or_unpickled(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("pickle")

        _, selector = scored([0.5, 1.5])
        for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "dumps"), (pickle, "dump")):
            monkeypatch.setattr(module, name, refuse)
        monkeypatch.setattr(torch, "load", refuse)
        monkeypatch.setattr(torch, "save", refuse)
        selector.save(tmp_path)
        assert Selector.load(tmp_path).logits.tolist() == [0.5, 1.5]
        # What a pickle begins with, or the zip archive that torch.save makes of one.
        assert all(path.read_bytes()[:2] not in (b"\x80\x04", b"PK") for path in tmp_path.iterdir())

    def test_statistics_that_share_memory_are_saved(self, tmp_path):
        one = torch.ones(2)
        _, selector = scored([0.5, 1.5], statistics={"first_loss": one, "ema_loss": one})
        selector.save(tmp_path)
        assert Selector.load(tmp_path).statistics["ema_loss"].tolist() == [1.0, 1.0]

    def test_settings_that_are_no_json_leave_the_folder_as_it_was(self, tmp_path):
        for value in (float("nan"), object()):
            _, selector = scored([0.5, 1.5])
            selector.settings = {"value": value}
            with pytest.raises((ValueError, TypeError)):
                selector.save(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_one_that_is_interrupted_over_another_is_no_selector(self, tmp_path, monkeypatch):
        _, selector = scored([0.5, 1.5])
        selector.save(tmp_path)

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(pq, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            selector.save(tmp_path)
        with pytest.raises(DataError, match=r"holds no selector: selector\.json is not there"):
            Selector.load(tmp_path)

    @pytest.mark.parametrize("name", ["selector.json", "selector.safetensors", "rows.parquet"])
    def test_a_file_that_is_missing_or_garbled_is_one_message(self, name, tmp_path):
        _, selector = scored([0.5, 1.5])
        selector.save(tmp_path)
        for content in (b"", b"\x80\x04garbled", b"[1, 2]", (tmp_path / name).read_bytes()[:40]):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=r"cannot be read: .*\. Copy the folder again") as error:
                Selector.load(tmp_path)
            assert "\n" not in str(error.value)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=f"holds no selector: {name} is not there"):
            Selector.load(tmp_path)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(DataError, match="Name a folder that `trl-robust seal`"):
            Selector.load(tmp_path / "gone")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"schema": 2}, "has schema 2, and this version reads 1"),
            ({"schema": None}, "cannot be read: 'schema'"),
            ({"dataset_fingerprint": None}, "cannot be read: 'dataset_fingerprint'"),
            ({"dataset_fingerprint": "0" * 64}, "is not whole"),
            ({"function": "raw_tanh"}, "gradient ascent"),
            ({"function": "cosine"}, "is 'cosine'; it is one of"),
            ({"settings": None}, "cannot be read: 'settings'"),
        ],
    )
    def test_settings_that_do_not_fit_are_one_message(self, changes, message, tmp_path):
        _, selector = scored([0.5, 1.5])
        selector.save(tmp_path)
        about = json.loads((tmp_path / "selector.json").read_text()) | changes
        about = {name: value for name, value in about.items() if value is not None}
        (tmp_path / "selector.json").write_text(json.dumps(about))
        with pytest.raises(DataError, match=message):
            Selector.load(tmp_path)

    @pytest.mark.parametrize("name", ["rows.parquet", "selector.safetensors"])
    def test_files_of_other_rows_and_of_another_order_are_told_apart(self, name, tmp_path):
        rows, selector = scored([0.5, 1.5, 2.5])
        order = [2, 0, 1]
        others = {
            "permuted": Selector(selector.logits[order], row_hashes(rows.select(order))),
            "longer": scored([0.5, 1.5, 2.5, 3.5])[1],
            "other": Selector(torch.tensor([0.5, 1.5, 2.0]), row_hashes(dataset("xyz"))),
        }
        selector.save(tmp_path / "own")
        for what, other in others.items():
            other.save(tmp_path / what)
            selector.save(tmp_path / "own")
            (tmp_path / "own" / name).write_bytes((tmp_path / what / name).read_bytes())
            with pytest.raises(DataError, match=r"is not whole|cannot be read: A selector of"):
                Selector.load(tmp_path / "own")


def test_nothing_in_it_depends_on_a_model(tmp_path):
    """Rows that one model ranked are selected without any model, tokenizer or template."""
    rows, selector = scored([0.1, 0.9, 0.5])
    selector.settings = {"method": "seal", "model": "org/large", "chat_template": "x"}
    selector.save(tmp_path)
    about = json.loads((tmp_path / "selector.json").read_text())
    about["settings"] = {"model": "org/another"}
    (tmp_path / "selector.json").write_text(json.dumps(about))
    assert Selector.load(tmp_path).selection(rows, count=1) == selector.selection(rows, count=1)
