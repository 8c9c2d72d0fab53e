"""Cells that are neither text nor messages, null or empty: refused with column, rows and what was found."""

import pytest
from datasets import Dataset

from trl_robust.data import DataError, as_conversation, as_prompt_completion, load_rows

USER, ANSWER, OTHER = ([{"role": role, "content": "w1"}] for role in ("user", "assistant", "assistant"))


def refused(rows, **options):
    with pytest.raises(DataError) as error:
        as_prompt_completion(Dataset.from_list(rows), "training", **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": 1, "completion": "a"}] * 2, "`prompt` is a value of type int in 2 rows (0, 1)"),
        ([{"prompt": "a", "chosen": 1, "rejected": "b"}], "`chosen` is a value of type int in row 0"),
        (
            [{"chosen": 1, "rejected": 2}],
            "`chosen` is a value of type int in row 0; `rejected` is a value of type int",
        ),
        ([{"prompt": ["a"], "completion": "a"}], "`prompt` is a list of str in row 0"),
        ([{"prompt": {"b": "x", "a": "y"}, "completion": "a"}], "`prompt` is a mapping with the keys ['a', 'b']"),
        ([{"prompt": [{"content": "a"}], "completion": ANSWER}], "`prompt` is a message without a `role` in row 0"),
        ([{"prompt": [{"role": "user"}], "completion": ANSWER}], "`prompt` is a message without a `content` in row 0"),
        ([{"messages": [{"content": "a"}]}], "`messages` is a message without a `role` in row 0"),
        ([{"messages": [{"role": "user", "content": 3}]}], "a message whose `content` is not text"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "Rename the keys `from` and `value` to `role` and"),
        ([{"conversations": [{"from": "human", "value": "a"}]}], "Rename `conversations` to `messages`, and in it"),
        ([{"text": 3}], "`text` is a value of type int in row 0"),
        (
            [{"prompt": "a", "chosen": ANSWER, "rejected": OTHER}],
            "text in `prompt` (row 0) and messages in `chosen` (row 0); all columns and rows must be of one kind",
        ),
        ([{"prompt": USER, "completion": "a"}], "messages in `prompt` (row 0) and text in `completion` (row 0)"),
    ],
)
def test_what_is_neither_text_nor_messages_is_named_with_its_column_and_rows(rows, words):
    assert words in refused(rows)


def test_a_numeric_column_of_a_csv_file(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n1,a\n2,b\n")
    with pytest.raises(DataError, match=r"`prompt` is a value of type int in 2 rows \(0, 1\)\. Convert or remove"):
        as_prompt_completion(load_rows(str(tmp_path / "rows.csv")), "training")


def test_messages_that_call_a_tool_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    rows = Dataset.from_list([{"messages": [*USER, call]}])
    assert as_prompt_completion(rows, "training") is rows


def test_null_and_empty_cells_of_all_columns_are_told_at_once():
    rows = [
        {"prompt": "a", "chosen": None, "rejected": "c"},
        {"prompt": " ", "chosen": "b", "rejected": ""},
        {"prompt": None, "chosen": "b", "rejected": "c"},
    ]
    assert (
        "has a null `prompt` in row 2, and an empty `prompt` in row 1, and a null `chosen/completion` in row 0, and "
        "an empty `rejected` in row 1. There is nothing to train on there" in refused(rows)
    )
    assert "a null `chosen/completion` in row 1" in refused([{"chosen": "a b", "rejected": "a c"}, {"rejected": "b"}])
    assert "a null `text` in row 1" in refused([{"text": "a"}, {"text": None}])
    assert "an empty `messages` in row 1" in refused([{"messages": USER}, {"messages": []}])


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": USER + ANSWER}])
def test_an_attack_on_prompts_needs_prompts(row):
    assert as_prompt_completion(Dataset.from_list([row]), "training")
    assert "`attack_positions: all`" in refused([row], needs_prompt=True)
    rows = Dataset.from_list([{"chosen": "a b", "rejected": "a c"}])
    assert "prompt" in as_prompt_completion(rows, "training", needs_prompt=True).column_names


@pytest.mark.parametrize(
    "row", [{"prompt": 3, "completion": "a"}, {"prompt": ["a"], "completion": "a"}, {"messages": [{"value": "a"}]}]
)
def test_no_conversation_is_made_of_what_is_neither(row):
    with pytest.raises(DataError, match="needs text, or a list of messages with `role` and `content`"):
        as_conversation(Dataset.from_list([row]), "s")


def test_a_system_prompt_does_not_fill_a_row_without_a_prompt():
    rows = [{"prompt": prompt, "completion": "a"} for prompt in ("w1", None, "")]
    made = as_conversation(Dataset.from_list(rows), "s")
    with pytest.raises(DataError, match="a null `prompt` in row 1, and an empty `prompt` in row 2"):
        as_prompt_completion(made, "training")
    made = as_conversation(Dataset.from_list([{"prompt": [], "completion": ANSWER}, {"prompt": USER}]), "s")
    with pytest.raises(DataError, match="an empty `prompt` in row 0, and a null `chosen/completion` in row 1"):
        as_prompt_completion(made, "training")


def test_a_conversation_is_made_of_text_beside_messages():
    rows = as_conversation(Dataset.from_list([{"prompt": "w1", "chosen": ANSWER, "rejected": OTHER}]))
    assert as_prompt_completion(rows, "training")[0]["prompt"] == USER
