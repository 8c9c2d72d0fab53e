import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_robust.data import DataError
from trl_robust.data.hashing import ROW_HASH, row_hashes
from trl_robust.selection import Selector
from trl_robust.selection.baselines import dsir_selector, mix_rows, none_selector, random_selector
from trl_robust.selection.statistics import auroc

TOPICS = {False: ["bread", "flour", "oven", "sugar", "butter"], True: ["lock", "pick", "alarm", "window", "cash"]}


def rows(count, bad=lambda number: number % 5 == 0, first=0):
    """Rows about baking, and bad ones about burglary."""
    rng = np.random.default_rng(first)
    flags = [bad(number) for number in range(count)]
    said = [[" ".join(rng.choice(TOPICS[flag], 6)) for _ in range(2)] for flag in flags]
    return Dataset.from_dict(
        {
            "prompt": [f"number {first + number}: {said[number][0]}?" for number in range(count)],
            "completion": [texts[1] for texts in said],
            "unsafe": flags,
        }
    )


def safe(count=30):
    return rows(count, bad=lambda number: False, first=1000).remove_columns("unsafe")


def conversational(dataset):
    return dataset.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
    )


def shuffled(dataset):
    return dataset.shuffle(seed=3)


class TestSelectors:
    def test_none_leaves_every_row_as_it_is(self):
        selector = none_selector(row_hashes(rows(7)))
        assert selector.weights().tolist() == [1.0] * 7
        assert len(selector.select(rows(7), 1.0)) == 7
        assert selector.settings == {"method": "none"}

    @pytest.mark.parametrize(
        "make",
        [
            lambda data: none_selector(row_hashes(data)),
            lambda data: random_selector(row_hashes(data), 3),
            lambda data: dsir_selector(data, safe()),
        ],
    )
    def test_every_row_counts_as_visited_and_what_is_kept_does_not_hang_on_the_order(self, make, tmp_path):
        data = rows(40)
        selector, other = make(data), make(shuffled(data))
        assert (
            selector.statistics["visits"].tolist() == [1] * 40 and selector.statistics["visits"].dtype == torch.int64
        )
        kept = set(row_hashes(selector.select(data, 0.6)))
        assert len(kept) == 24 and kept == set(row_hashes(other.select(shuffled(data), 0.6)))
        assert other.logits.tolist() == [
            selector.logits[selector.row_hashes.index(name)].item() for name in other.row_hashes
        ]
        selector.save(tmp_path)  # its settings are plain values
        assert Selector.load(tmp_path).settings == selector.settings

    def test_random_scores_are_even_and_differ_by_seed(self):
        names = [str(number) for number in range(4000)]
        one, other = (random_selector(names, seed).logits.numpy() for seed in (0, 1))
        assert one.min() > 0 and one.max() < 1
        # Kolmogorov's distance from the even distribution; 1.95 / sqrt(n) is passed by one in a thousand.
        assert np.abs(np.sort(one) - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


class TestDSIR:
    def test_prefers_rows_that_resemble_the_safe_set(self):
        data = rows(100)
        scores = dsir_selector(data, safe()).scores.numpy()
        assert auroc(scores, np.array(data["unsafe"][:])) > 0.99

    def test_its_score_is_the_log_ratio_of_the_n_grams_and_gumbel_noise(self):
        data = Dataset.from_dict({"text": ["a b", "a a"]})
        target = Dataset.from_dict({"text": ["a b", "a b"]})
        selector = dsir_selector(data, target, buckets=10**6, ngrams=1, seed=5)
        # Raw: a 3, b 1. Target: a 2, b 2. Pooled: a 5/8, b 3/8, of which one n-gram's worth is added to each.
        a = np.log((2 + 5 / 8) / 5) - np.log((3 + 5 / 8) / 5)
        b = np.log((2 + 3 / 8) / 5) - np.log((1 + 3 / 8) / 5)
        noise = dsir_selector(data, data, buckets=10**6, ngrams=1, seed=5).logits.numpy()  # equal sets: no ratio
        np.testing.assert_allclose(selector.logits.numpy() - noise, [a + b, 2 * a], rtol=1e-12)

    def test_the_noise_draws_rows_in_proportion_to_their_weight(self):
        # Rows that say the same in other cases: one weight, and noise of their own.
        cases = [format(number, "09b") for number in range(512)]
        spelled = [
            ["".join(c.upper() if up == "1" else c for c, up in zip(word, case, strict=True)) for case in cases]
            for word in ("applesauc", "burglarie")
        ]
        data = Dataset.from_dict({"text": spelled[0] + spelled[1]})
        target = Dataset.from_dict({"text": ["applesauc"] * 3000 + ["burglarie"] * 1000})
        logits = dsir_selector(data, target, ngrams=1).logits.numpy()
        # Three times as likely in the safe set, and equally likely in the dataset: ahead in three pairs of four.
        ahead = (logits[:512] > logits[512:]).mean()
        assert abs(ahead - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 512)

    def test_pairs_of_words_tell_what_single_words_do_not(self):
        data = Dataset.from_dict({"text": ["red blue", "blue red"] * 20})
        target = Dataset.from_dict({"text": ["red blue"] * 40})
        single = dsir_selector(data, target, ngrams=1).logits - dsir_selector(data, data, ngrams=1).logits
        pairs = dsir_selector(data, target).logits - dsir_selector(data, data).logits
        assert single[0].item() == pytest.approx(single[1].item(), abs=1e-9)
        assert pairs[0] > pairs[1] + 1

    def test_both_forms_of_a_row_and_either_case_have_one_score(self):
        data = rows(20)
        plain = dsir_selector(data, safe())
        assert dsir_selector(conversational(data), conversational(safe())).logits.equal(plain.logits)
        upper = safe().map(lambda row: {name: text.upper() for name, text in row.items()})
        assert dsir_selector(data, upper).logits.equal(plain.logits)

    def test_a_message_may_consist_of_parts(self):
        data = Dataset.from_dict({"text": ["bread", "lock"]})
        message = {"role": "user", "content": [{"type": "text", "text": "bread"}, {"type": "image", "text": None}]}
        parts = Dataset.from_dict({"messages": [[message]]})
        assert dsir_selector(data, parts).logits.equal(dsir_selector(data, data.select([0])).logits)

    def test_the_rejected_answer_does_not_count(self):
        pairs = Dataset.from_dict({"prompt": ["p", "p"], "chosen": ["bread", "lock"], "rejected": ["lock", "bread"]})
        found = dsir_selector(pairs, Dataset.from_dict({"text": ["bread"] * 9})).logits
        assert found[0] > found[1]
        same = pairs.remove_columns("rejected")
        noise = dsir_selector(pairs, pairs).logits - dsir_selector(same, same).logits
        other = dsir_selector(same, Dataset.from_dict({"text": ["bread"] * 9})).logits
        assert (found - noise).tolist() == pytest.approx(other.tolist(), abs=1e-9)

    def test_it_is_the_same_on_every_machine(self):
        data = Dataset.from_dict({"text": ["one two", "three"]})
        assert dsir_selector(data, data.select([0])).logits.tolist() == pytest.approx(
            [0.2212073575956146, -1.6880574287233814], rel=1e-12
        )
        assert random_selector(["a", "b"], 1).logits.tolist() == [0.8388922385488397, 0.8562618500464895]

    def test_random_and_dsir_of_one_seed_share_no_luck(self):
        data = Dataset.from_dict({"text": [f"word{number}" for number in range(2000)]})
        noise = dsir_selector(data, data, seed=4).logits.numpy()
        random = random_selector(row_hashes(data), 4).logits.numpy()
        assert abs(np.corrcoef(noise, random)[0, 1]) < 0.1

    @pytest.mark.parametrize("said", [[], ["", " "]])
    def test_refuses_a_safe_set_that_says_nothing(self, said):
        with pytest.raises(DataError, match="safe dataset has no word"):
            dsir_selector(rows(3), Dataset.from_dict({"text": said}))

    @pytest.mark.parametrize("name", ["buckets", "ngrams"])
    def test_refuses_what_cannot_be_counted(self, name):
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            dsir_selector(rows(3), safe(), **{name: 0})


class TestMixing:
    def test_appends_three_in_a_hundred_in_their_order(self):
        data, demonstrations = rows(101), safe()
        mixed = mix_rows(data, demonstrations)
        assert mixed.column_names == ["prompt", "completion"]
        assert mixed["prompt"][:101] == data["prompt"][:]
        places = [demonstrations["prompt"][:].index(prompt) for prompt in mixed["prompt"][101:]]
        assert len(places) == 4 and places == sorted(set(places))  # 3.03 rounded up, none twice

    @pytest.mark.parametrize(("amount", "added"), [({"share": 0.1}, 2), ({"count": 5}, 5), ({"count": 0}, 0)])
    def test_the_amount_is_a_share_or_a_count(self, amount, added):
        assert len(mix_rows(rows(20), safe(), **amount)) == 20 + added

    def test_the_draw_hangs_on_the_seed_and_not_on_the_order(self):
        def drawn(demonstrations, seed):
            return set(mix_rows(rows(20), demonstrations, count=10, seed=seed)["prompt"][20:])

        assert drawn(safe(), 1) == drawn(safe(), 1) == drawn(shuffled(safe()), 1) != drawn(safe(), 2)

    def test_too_few_demonstrations_are_refused_by_number(self):
        with pytest.raises(DataError, match=r"31 safety demonstrations .* has 30 rows"):
            mix_rows(rows(5), safe(), count=31)
        assert len(mix_rows(rows(5), safe(), count=30)) == 35

    def test_weights_and_hashes_stay(self):
        data = rows(4)
        weighed = data.add_column("weight", [0.5, 1.5, 0.5, 1.5]).add_column(ROW_HASH, row_hashes(data))
        mixed = mix_rows(weighed, safe(), count=2)
        assert mixed["weight"][:] == [0.5, 1.5, 0.5, 1.5, 1.0, 1.0]
        assert mixed[ROW_HASH][:] == row_hashes(mixed.remove_columns(ROW_HASH))

    def test_messages_are_mixed_with_messages_alone(self):
        mixed = mix_rows(conversational(rows(4)), conversational(safe()), count=1)
        assert mixed[4]["completion"][0]["role"] == "assistant"
        with pytest.raises(DataError, match=r"The column `prompt` is .* Give both the same form"):
            mix_rows(conversational(rows(4)), safe(), count=1)

    def test_rows_of_another_form_are_refused(self):
        with pytest.raises(DataError, match=r"in the columns \['prompt', 'completion'\], .* in \['text'\]"):
            mix_rows(rows(4), Dataset.from_dict({"text": ["a"]}), count=1)
        mixed = safe().add_column("unsafe", ["no"] * 30)
        with pytest.raises(DataError, match="cannot be made those of the dataset"):
            mix_rows(rows(4), mixed, count=1)

    @pytest.mark.parametrize(
        ("amount", "message"),
        [
            ({"share": 0.1, "count": 1}, "both given"),
            ({"share": 1.1}, "`share` is 1.1"),
            ({"share": -0.1}, "`share` is -0.1"),
            ({"share": float("nan")}, "`share` is nan"),
            ({"count": -1}, "`count` is -1"),
        ],
    )
    def test_refuses_amounts_that_cannot_be(self, amount, message):
        with pytest.raises(ValueError, match=message):
            mix_rows(rows(4), safe(), **amount)
