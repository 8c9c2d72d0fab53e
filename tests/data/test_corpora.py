"""Rows for unlearning: texts to forget beside texts to retain, tokens with generic labels; what is refused."""

from collections import Counter

import pytest
from datasets import Dataset, Features, Value

from trl_robust.data import (
    DataError,
    as_prompt_completion,
    generic_label_rows,
    is_corpus_pairs,
    is_generic_labels,
    pair_corpora,
)


def texts(*values, **columns):
    return Dataset.from_dict({"text": list(values), **columns})


FORGET = texts("a", "b", "c", "d", "e", topic=["bio", "bio", "cyber", "cyber", "bio"])
RETAIN = texts("r", "s", "t")


# Pairs


def test_every_text_to_forget_comes_once_in_its_order_with_its_topic_beside_a_text_to_retain():
    pairs = pair_corpora(FORGET, RETAIN)
    assert pairs.column_names == ["forget", "retain", "topic"]
    assert pairs["forget"][:] == list("abcde")
    assert pairs["topic"][:] == FORGET["topic"][:]
    assert set(pairs["retain"][:]) <= set("rst")


@pytest.mark.parametrize(("forget", "retain"), [(5, 3), (7, 7), (2, 9), (9, 2), (1, 1)])
def test_all_texts_to_retain_come_before_any_comes_again(forget, retain):
    given = [texts(*(f"{kind}{n}" for n in range(count))) for kind, count in (("f", forget), ("r", retain))]
    pairs = pair_corpora(*given)
    counts = Counter(pairs["retain"][:])
    assert len(pairs) == forget and sum(counts.values()) == forget
    assert max(counts.values()) - min(counts[f"r{n}"] for n in range(retain)) <= 1
    for start in range(0, forget, retain):
        part = pairs["retain"][start : start + retain]
        assert len(set(part)) == len(part)


def test_the_order_is_that_of_the_seed_and_each_round_is_another():
    retain = texts(*(f"r{n}" for n in range(8)))
    forget = texts(*(f"f{n}" for n in range(24)))

    def order(seed):
        return pair_corpora(forget, retain, seed=seed)["retain"][:]

    assert order(1) == order(1) != order(2)
    assert pair_corpora(forget, retain)["retain"][:] == order(0)
    rounds = [order(1)[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(part) == sorted(retain["text"][:]) for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


@pytest.mark.parametrize("empty", ["", "  ", "\n\t", None])
def test_empty_texts_are_left_out_of_both_and_topics_stay_beside_their_texts(empty):
    forget = texts("a", empty, "b", empty, "c", topic=["x", "lost", "y", "lost", "z"])
    retain = texts(empty, "r", empty, "s")
    pairs = pair_corpora(forget, retain)
    assert pairs["forget"][:] == ["a", "b", "c"]
    assert pairs["topic"][:] == ["x", "y", "z"]
    assert set(pairs["retain"][:]) == {"r", "s"}


def test_texts_themselves_are_not_changed_and_other_columns_do_not_come_along():
    forget = texts(" a \n", title=["t"], topic=[3])
    pairs = pair_corpora(forget, texts("r ", url=["u"]))
    assert pairs.to_list() == [{"forget": " a \n", "retain": "r ", "topic": "3"}]
    assert "topic" not in pair_corpora(texts("a"), texts("r", topic=["x"])).column_names


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ((Dataset.from_dict({"content": ["a"]}), RETAIN), r"forget corpus has the columns \['content'\].*`text`"),
        ((FORGET, Dataset.from_dict({"page": ["a"], "id": [1]})), r"retain corpus has the columns \['page', 'id'\]"),
        ((texts("", " "), RETAIN), "forget corpus has no text that is not empty"),
        ((FORGET, texts(None)), "retain corpus has no text that is not empty"),
        ((texts(1, 2), RETAIN), r"forget corpus has a `text` that is no text in 2 rows \(0, 1\)\. Convert it"),
        ((FORGET, texts(["r"])), r"retain corpus has a `text` that is no text in row 0"),
    ],
    ids=["no text", "no retain text", "all empty", "all null", "numbers", "lists"],
)
def test_a_corpus_without_texts_is_refused_with_its_columns_or_rows(corpora, message):
    with pytest.raises(DataError, match=message):
        pair_corpora(*corpora)


def test_a_corpus_without_rows_is_refused():
    nothing = Dataset.from_dict({"text": []}, features=Features({"text": Value("string")}))
    with pytest.raises(DataError, match="forget corpus has no text that is not empty"):
        pair_corpora(nothing, RETAIN)


def test_pairs_are_known_by_their_columns_and_become_rows_of_a_text_and_one_to_forget():
    pairs = pair_corpora(FORGET, RETAIN)
    assert is_corpus_pairs(pairs) and not is_corpus_pairs(FORGET) and not is_generic_labels(pairs)
    made = as_prompt_completion(pairs, "training", needs_rejected=True)
    assert set(made.column_names) == {"text", "forget", "topic"}
    assert made["forget"][:] == pairs["forget"][:] and made["text"][:] == pairs["retain"][:]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "r"), ("b", ""), ("c", " ")], r"training dataset has an empty `retain` in 2 rows \(1, 2\)"),
        ([("", "r"), (None, "s")], r"a null `forget` in row 1, and an empty `forget` in row 0"),
    ],
)
def test_pairs_made_by_hand_with_an_empty_text_are_refused_with_the_rows(rows, message):
    forget, retain = zip(*rows, strict=True)
    with pytest.raises(DataError, match=message):
        as_prompt_completion(Dataset.from_dict({"forget": forget, "retain": retain}), "training")


def test_corpora_have_no_prompts_for_an_attack_on_prompts():
    with pytest.raises(DataError, match=r"of which it has none\..*`attack_positions: all`"):
        as_prompt_completion(pair_corpora(FORGET, RETAIN), "training", needs_prompt=True)
    with pytest.raises(DataError, match="of which it has none"):
        as_prompt_completion(LABELLED, "training", needs_prompt=True)


# Generic labels

LABELLED = Dataset.from_dict({"tokens": [[7, 8, 9, 10], [11, 12]], "labels": [[30, 31, 9, 33], [34, 35]]})


def test_generic_labels_are_known_by_their_columns_and_pass_as_they_are():
    assert is_generic_labels(LABELLED) and not is_corpus_pairs(LABELLED)
    assert as_prompt_completion(LABELLED, "training", needs_rejected=True).to_list() == LABELLED.to_list()


def test_the_generic_label_is_wanted_and_the_token_is_not_from_the_second_on():
    made = generic_label_rows(LABELLED, None)
    assert made.to_list() == [
        {
            "input_ids": [7, 8, 9, 10],
            "labels": [-100, 31, 9, 33],  # label i stands at token i, and the model shifts
            "away_input_ids": [7, 8, 9, 10],
            "away_labels": [-100, 8, 9, 10],
        },
        {"input_ids": [11, 12], "labels": [-100, 35], "away_input_ids": [11, 12], "away_labels": [-100, 12]},
    ]


@pytest.mark.parametrize("limit", [2, 3, 4, 9])
def test_truncation_cuts_tokens_and_labels_alike(limit):
    """Defect D15: the reference code cut masks and not labels."""
    whole = generic_label_rows(LABELLED, None)
    for row, uncut in zip(generic_label_rows(LABELLED, limit), whole, strict=True):
        for key, values in row.items():
            assert values == uncut[key][:limit], key
        assert len({len(values) for values in row.values()}) == 1


def test_a_label_of_minus_100_leaves_its_token_out_of_the_wanted_ones_only():
    rows = Dataset.from_dict({"tokens": [[7, 8, 9]], "labels": [[30, -100, 32]]})
    (made,) = generic_label_rows(as_prompt_completion(rows, "training"), None)
    assert made["labels"] == [-100, -100, 32] and made["away_labels"] == [-100, 8, 9]


@pytest.mark.parametrize(
    ("tokens", "labels", "where"),
    [
        ([[7, 8], [9, 10, 11]], [[7, 8], [9, 10]], "row 1"),
        ([[7], [8, 9]], [[7], [8, 9]], "row 0"),
        ([[7, 8], [], [9, 10]], [[7, 8], [], [9, 10]], "row 1"),
        ([[7, 8], None], [[7, 8], [1, 2]], "row 1"),
        ([[7, 8], [1, 2]], [None, [1, None]], r"2 rows \(0, 1\)"),
        ([[7.5, 8.5]], [[7.0, 8.0]], "row 0"),
        (["w1 w2", "w3"], [[7, 8], [9, 10]], r"2 rows \(0, 1\)"),
        ([[1]] * 9, [[1]] * 9, r"9 rows \(0, 1, 2, 3, 4, \.\.\.\)"),
    ],
    ids=["lengths", "one token", "none", "null tokens", "null labels", "fractions", "text", "many"],
)
def test_tokens_and_labels_that_do_not_belong_together_are_refused_with_the_rows(tokens, labels, where):
    rows = Dataset.from_dict({"tokens": tokens, "labels": labels})
    with pytest.raises(DataError, match=rf"training dataset has generic labels, and .*\(at least 2\) in {where}\."):
        as_prompt_completion(rows, "training")


def test_a_dataset_of_labels_without_rows_is_refused():
    with pytest.raises(DataError, match="evaluation dataset has no rows"):
        as_prompt_completion(LABELLED.select([]), "evaluation")
