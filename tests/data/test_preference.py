"""From the columns users have to the batches that are trained on."""

import pytest
from datasets import Dataset
from tiny import completion_data, make_tokenizer, preference_data
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_robust.data import (
    DataError,
    LATDataCollator,
    add_user_spans,
    as_conversation,
    as_prompt_completion,
    check_none_lost,
    join_benign,
    user_spans,
)


def test_preference_data_keeps_its_rejected_completion_beside_the_wanted_one():
    data = preference_data(4)
    made = as_prompt_completion(data, "training", needs_rejected=True)
    assert set(made.column_names) == {"prompt", "completion", "rejected"}
    assert made["completion"][:] == data["chosen"][:] and made["rejected"][:] == data["rejected"][:]


def test_prompt_completion_data_passes_unchanged():
    data = completion_data(4)
    assert as_prompt_completion(data, "training").to_list() == data.to_list()


def test_a_prompt_inside_the_completions_is_taken_out():
    rows = [{"chosen": "w1 w2 a b", "rejected": "w1 w2 c"}]
    made = as_prompt_completion(Dataset.from_list(rows), "training", needs_rejected=True).to_list()
    assert made == [{"prompt": "w1 w2", "completion": " a b", "rejected": " c"}]


def test_unknown_columns_are_refused_with_what_is_needed():
    with pytest.raises(DataError, match=r"columns \['question', 'answer'\]; `prompt` and `completion` are needed"):
        as_prompt_completion(Dataset.from_list([{"question": "a", "answer": "b"}]), "training")


def test_row_numbers_are_counted_from_zero_and_shortened():
    rows = [{"prompt": "w1", "completion": "" if number > 1 else " w2"} for number in range(10)]
    with pytest.raises(DataError, match=r"in 8 rows \(2, 3, 4, 5, 6, \.\.\.\)"):
        as_prompt_completion(Dataset.from_list(rows), "training")


def test_lost_rows_are_named_and_none_lost_is_no_error():
    rows = Dataset.from_list([{"row": number} for number in range(4)])
    check_none_lost(rows, rows.shuffle(seed=0), "training", 8)
    with pytest.raises(DataError, match=r"training dataset has a prompt longer than the limit in row 2: 8 tokens"):
        check_none_lost(rows, rows.select([3, 0, 1]), "training", 8)


# Benign rows


def tokens(count, start):
    return Dataset.from_list(
        [{"input_ids": [start + n] * (n % 3 + 2), "labels": [-100] + [start + n] * (n % 3 + 1)} for n in range(count)]
    )


@pytest.mark.parametrize(("rows", "benign", "each"), [(7, 3, 1), (5, 8, 2), (10, 3, 4), (4, 4, 1), (2, 9, 1)])
def test_benign_rows_are_dealt_out_evenly_each_with_its_own_labels(rows, benign, each):
    given = tokens(benign, 100)
    joined = join_benign(tokens(rows, 10), given, each, seed=3)
    dealt = []
    for row in joined:
        assert len(row["benign_input_ids"]) == len(row["benign_labels"]) == each
        for ids, labels in zip(row["benign_input_ids"], row["benign_labels"], strict=True):
            number = ids[0] - 100
            assert ids == given[number]["input_ids"] and labels == given[number]["labels"]
            dealt.append(number)
    counts = [dealt.count(number) for number in range(benign)]
    assert sum(counts) == rows * each
    assert max(counts) - min(counts) <= 1
    assert joined["input_ids"][:] == tokens(rows, 10)["input_ids"][:]


def test_the_order_of_benign_rows_is_that_of_the_seed_and_a_new_one_each_round():
    def order(seed):
        return [row[0][0] for row in join_benign(tokens(24, 10), tokens(8, 100), 1, seed)["benign_input_ids"]]

    assert order(1) == order(1) != order(2)
    rounds = [order(1)[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(part) == list(range(100, 108)) for part in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_batch_holds_the_wanted_the_rejected_and_the_benign_rows():
    collator = LATDataCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    rows = [
        {
            "input_ids": [7, 8, 9],
            "labels": [-100, 8, 9],
            "away_input_ids": [7, 11],
            "away_labels": [-100, 11],
            "benign_input_ids": [[20, 21], [22, 23, 24, 25]],
            "benign_labels": [[-100, 21], [-100, -100, 24, 25]],
            "last_user_span": [0, 1],
        },
        {
            "input_ids": [12, 13],
            "labels": [-100, 13],
            "away_input_ids": [12, 14, 15, 16],
            "away_labels": [-100, -100, 15, 16],
            "benign_input_ids": [[26, 27], [28, 29]],
            "benign_labels": [[-100, 27], [28, 29]],
            "last_user_span": [0, 1],
        },
    ]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [12, 13, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [-100, 13, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["away_input_ids"].tolist() == [[7, 11, 0, 0], [12, 14, 15, 16]]
    assert batch["away_labels"].tolist() == [[-100, 11, -100, -100], [-100, -100, 15, 16]]
    assert batch["away_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    benign = batch["benign"]
    assert benign["input_ids"].tolist() == [[20, 21, 0, 0], [22, 23, 24, 25], [26, 27, 0, 0], [28, 29, 0, 0]]
    assert benign["labels"].tolist() == [
        [-100, 21, -100, -100], [-100, -100, 24, 25], [-100, 27, -100, -100], [28, 29, -100, -100]
    ]  # fmt: skip
    assert batch["last_user_span"].tolist() == [[0, 1], [0, 1]]
    plain = collator([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    assert set(plain) == {"input_ids", "labels", "attention_mask"}


# The last user turn


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([{"role": "user", "content": "w1 w2 w3"}], "w1 w2 w3"),
        (
            [
                {"role": "system", "content": "w9"},
                {"role": "user", "content": "w1 w2"},
                {"role": "assistant", "content": "w3"},
                {"role": "user", "content": "w1 w5"},
            ],
            "w1 w5",
        ),
        ([{"role": "user", "content": "w4 w4"}, {"role": "assistant", "content": "w4"}], "w4 w4"),
    ],
)
def test_the_last_user_turn_is_found_in_the_tokens(prompt, expected):
    tokenizer = make_tokenizer()
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    [[start, end]] = user_spans(tokenizer, prompt, last_only=True)
    assert tokenizer.decode(ids[start:end]) == expected


def test_every_user_turn_is_found_in_the_tokens_and_short_rows_are_filled_up():
    tokenizer = make_tokenizer()
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w1 w5 w2")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    spans = user_spans(tokenizer, prompt)
    assert [tokenizer.decode(ids["input_ids"][start:end]) for start, end in spans] == ["w1 w2", "w1 w5 w2"]
    rows = add_user_spans(Dataset.from_dict({"prompt": [prompt, prompt[:1]]}), tokenizer, "all_user", "training")
    collator = LATDataCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    found = collator([{"input_ids": [7, 8], "labels": [-100, 8], **row} for row in rows])
    assert found["user_spans"].tolist() == [spans, [spans[0], [0, 0]]]


def test_a_plain_prompt_is_one_user_turn():
    assert user_spans(make_tokenizer(), "w1 w2 w3") == [[0, 3]]


def test_a_conversation_without_a_user_turn_is_refused():
    with pytest.raises(DataError, match="Positions in user turns need one in every prompt"):
        user_spans(make_tokenizer(), [{"role": "assistant", "content": "w1"}])


def ultrafeedback(count: int = 3) -> Dataset:
    """Rows in UltraFeedback's form: the prompt as text, and again as the first turn of both completions."""
    return Dataset.from_list(
        [
            {
                "prompt": f"w{i} w1",
                "chosen": [{"role": "user", "content": f"w{i} w1"}, {"role": "assistant", "content": "w3"}],
                "rejected": [{"role": "user", "content": f"w{i} w1"}, {"role": "assistant", "content": "w5"}],
                "score_chosen": 8.0,
            }
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("conversations_first", [False, True])
def test_a_prompt_that_stands_as_text_beside_conversations_that_begin_with_it_comes_once(conversations_first):
    data = as_conversation(ultrafeedback(), "w9") if conversations_first else ultrafeedback()
    made = as_prompt_completion(data, "training", needs_rejected=True, needs_prompt=True)
    system = [{"role": "system", "content": "w9"}] if conversations_first else []
    for number, row in enumerate(made):
        assert [dict(turn) for turn in row["prompt"]] == [*system, {"role": "user", "content": f"w{number} w1"}]
        assert [dict(turn) for turn in row["completion"]] == [{"role": "assistant", "content": "w3"}]
        assert [dict(turn) for turn in row["rejected"]] == [{"role": "assistant", "content": "w5"}]
