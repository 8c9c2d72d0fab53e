import hashlib
import json
import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_robust.data import DataError, add_row_hashes, as_conversation, row_hash, row_hashes

PAIRS = {"prompt": ["Hi", "Name a café"], "completion": ["Hello", "Flore"]}


def messages(role, text):
    return [{"role": role, "content": text}]


class TestRowHash:
    def test_it_is_the_hash_of_what_is_said(self):
        said = {"completion": [["assistant", "Hello"]], "prompt": [["user", "Hi"]]}
        expected = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        assert row_hash({"prompt": "Hi", "completion": "Hello"}) == expected

    def test_plain_text_and_messages_are_one_row(self):
        plain = row_hash({"prompt": "Hi", "chosen": "a", "rejected": "b"})
        chat = {"prompt": messages("user", "Hi"), "chosen": messages("assistant", "a")}
        assert row_hash(chat | {"rejected": messages("assistant", "b")}) == plain
        assert row_hash(chat | {"rejected": messages("assistant", "c")}) != plain

    @pytest.mark.parametrize(
        "other",
        [
            {"prompt": " Hi\n", "completion": "one\r\ntwo é"},
            {"prompt": "Hi", "completion": unicodedata.normalize("NFD", "one\ntwo é")},
            {"prompt": "Hi", "completion": "one\rtwo é\t", "source": "x", "weight": 3.0, "input_ids": [1]},
            {"prompt": "Hi", "completion": "one\ntwo é", "chosen": None, "messages": None},
        ],
    )
    def test_white_space_around_line_ends_unicode_forms_and_other_columns_do_not_count(self, other):
        assert row_hash(other) == row_hash({"prompt": "Hi", "completion": "one\ntwo é"})

    @pytest.mark.parametrize(
        "other",
        [
            {"prompt": "Hi", "completion": "one two"},
            {"prompt": "Hi", "completion": "One\ntwo"},
            {"prompt": "Hi", "chosen": "one\ntwo"},
            {"prompt": "one\ntwo", "completion": "Hi"},
            {"prompt": "Hi", "completion": messages("user", "one\ntwo")},
            {"prompt": messages("system", "Be kind.") + messages("user", "Hi"), "completion": "one\ntwo"},
            {"messages": messages("user", "Hi") + messages("assistant", "one\ntwo")},
        ],
    )
    def test_what_is_said_by_whom_and_in_which_column_counts(self, other):
        assert row_hash(other) != row_hash({"prompt": "Hi", "completion": "one\ntwo"})

    def test_texts_do_not_run_into_each_other(self):
        turns = [messages("user", "a") + messages("user", "b"), messages("user", "a\nb"), messages("user", "ab")]
        assert len({row_hash({"messages": turn}) for turn in turns}) == 3

    def test_tool_calls_count_and_their_absence_does_not(self):
        def call(name):
            return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name}}]}

        assert row_hash({"messages": [call("look")]}) != row_hash({"messages": [call("buy")]})
        bare = {"role": "assistant", "content": "x"}
        assert row_hash({"messages": [bare]}) == row_hash({"messages": [bare | {"tool_calls": None}]})

    @given(st.text(st.characters(exclude_categories=("Cs",))))
    def test_a_text_and_its_normal_form_are_one(self, text):
        normal = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").strip()
        assert row_hash({"text": text}) == row_hash({"text": normal}) == row_hash({"text": f"\r\n{text} "})


class TestRowHashes:
    def test_one_a_row_whatever_the_form(self):
        rows = Dataset.from_dict(PAIRS)
        assert row_hashes(rows) == [row_hash(row) for row in rows]
        assert row_hashes(as_conversation(rows)) == row_hashes(rows)
        assert row_hashes(rows.add_column("source", ["a", "b"])) == row_hashes(rows)

    def test_the_column_stays_with_rows_that_are_changed(self):
        rows = Dataset.from_dict(PAIRS)
        hashed = add_row_hashes(rows)
        talk = as_conversation(hashed, "Be kind.")
        assert row_hashes(talk) == row_hashes(rows)
        assert row_hashes(talk.remove_columns("row_hash")) != row_hashes(rows)
        assert add_row_hashes(hashed) is hashed

    def test_prompts_inside_the_completions_are_taken_out(self):
        apart = Dataset.from_dict({"prompt": ["Hi"], "chosen": ["good"], "rejected": ["bad"]})
        inside = {
            "chosen": [messages("user", "Hi") + messages("assistant", "good")],
            "rejected": [messages("user", "Hi") + messages("assistant", "bad")],
        }
        assert row_hashes(Dataset.from_dict(inside)) == row_hashes(apart)
        assert row_hashes(Dataset.from_dict({"prompt": ["Hi"], **inside})) == row_hashes(apart)

    def test_pairs_as_the_trainers_have_them(self):
        pairs = Dataset.from_dict({"prompt": ["Hi"], "chosen": ["good"], "rejected": ["bad"]})
        assert row_hashes(pairs.rename_column("chosen", "completion")) == row_hashes(pairs)

    def test_columns_that_say_nothing_are_refused(self):
        with pytest.raises(DataError, match=r"has the columns \['question'\]; rows are known by `prompt`"):
            row_hashes(Dataset.from_dict({"question": ["Hi"]}))

    def test_cells_that_are_no_text_are_refused_with_their_rows(self):
        with pytest.raises(DataError, match="`completion` is a value of type int in 2 rows"):
            row_hashes(Dataset.from_dict({"prompt": ["Hi", "Ho"], "completion": [1, 2]}))
        with pytest.raises(DataError, match="`row_hash` that is no text in every row"):
            row_hashes(Dataset.from_dict({"prompt": ["Hi", "Ho"], "row_hash": ["a", None]}))
