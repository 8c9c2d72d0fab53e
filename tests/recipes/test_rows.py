import json

import pytest
from datasets import Dataset, DatasetDict
from recipe_parts import settings, write_recipe, write_rows

from trl_robust.data import DataError, as_conversation, content_hash, load_rows
from trl_robust.recipes import RecipeError, load_recipe
from trl_robust.recipes.rows import load_share

ROWS = [{"prompt": f"w{number}", "completion": f"w{number + 1}"} for number in range(4)]


class TestLoadRows:
    @pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "saved", "saved splits", "folder"])
    def test_every_form_gives_the_same_rows(self, tmp_path, form):
        made = Dataset.from_list(ROWS)
        path = tmp_path / f"rows.{form}"
        if form == "jsonl":
            write_rows(path, ROWS)
        elif form == "json":
            path.write_text(json.dumps(ROWS))
        elif form == "csv":
            made.to_csv(path)
        elif form == "parquet":
            made.to_parquet(path)
        elif form == "saved":
            made.save_to_disk(path)
        elif form == "saved splits":
            DatasetDict({"train": made, "test": made}).save_to_disk(path)
        else:
            path.mkdir()
            write_rows(path / "train.jsonl", ROWS)
        rows = load_rows(str(path))
        assert list(rows) == ROWS
        assert content_hash(rows) == content_hash(made)
        assert content_hash(rows) != content_hash(made.select([1, 0, 2, 3]))

    def test_slices_of_a_split(self, tmp_path):
        assert len(load_rows(str(write_rows(tmp_path / "rows.jsonl", ROWS)), split="train[:2]")) == 2

    @pytest.mark.parametrize(
        "name, content, words",
        [
            ("a.jsonl", b"", "is empty"),
            ("a.csv", b"", "is empty"),
            ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": oops}\n', "line 3 is not JSON"),
            ("a.jsonl", b"[1]\n", "line 1 is not an object"),
            ("a.jsonl", b'{"prompt": "\xff"}\n', "line 1 is not UTF-8"),
            ("a.json", b'[{"a": 1},', "cannot be read"),
            ("a.csv", b"a,b\n", "has no rows"),
            ("a.parquet", b"nope", "cannot be read"),
            ("a.txt", b"hello", "must end in one of .jsonl, .json, .csv, .parquet"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_refused_with_the_place(self, tmp_path, name, content, words):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            load_rows(str(tmp_path / name))

    @pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "a/b/gone", "/gone", "~/gone"])
    def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(self, name):
        with pytest.raises(DataError, match=r"There is no dataset .* does not exist"):
            load_rows(name)

    def test_a_hub_id_without_the_hub_says_where_was_looked(self):
        with pytest.raises(DataError, match=r"neither a file nor a folder here .* hub did not give it"):
            load_rows("nobody/nothing")

    def test_a_split_that_is_not_there_is_named_with_those_that_are(self, tmp_path):
        write_rows(tmp_path / "rows.jsonl", ROWS)
        DatasetDict({"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=r"no split 'test'; it has \['train'\]"):
            load_rows(str(tmp_path / "rows.jsonl"), split="test")
        with pytest.raises(DataError, match=r"no split 'test'; it has \['a', 'b'\]"):
            load_rows(str(tmp_path / "saved"), split="test")

    def test_an_empty_folder_and_files_that_do_not_go_together(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="cannot be read"):
            load_rows(str(tmp_path / "empty"))
        (tmp_path / "mixed").mkdir()
        write_rows(tmp_path / "mixed" / "a.jsonl", [{"prompt": "a"}])
        write_rows(tmp_path / "mixed" / "b.jsonl", [{"other": "a"}])
        with pytest.raises(DataError, match="column names don't match"):
            load_rows(str(tmp_path / "mixed"))

    def test_the_columns_of_the_published_benign_data(self, tmp_path):
        rows = [{"prompt": "a", "response": "b", "refusal": "c"}]
        assert list(load_rows(str(write_rows(tmp_path / "a.jsonl", rows)))) == [{"prompt": "a", "completion": "b"}]
        rows = [{"prompt": "a", "response": "b", "refusal": "c", "completion": "d"}]
        assert list(load_rows(str(write_rows(tmp_path / "b.jsonl", rows)))) == rows


class TestConversations:
    def test_plain_rows_become_turns(self):
        row = as_conversation(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "s")[0]
        assert row == {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        }

    def test_conversations_are_left_alone_but_for_a_missing_system_prompt(self):
        user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "own"}
        answer = [{"role": "assistant", "content": "b"}]
        rows = Dataset.from_list(
            [{"prompt": [user], "completion": answer}, {"prompt": [system, user], "completion": answer}]
        )
        assert list(as_conversation(rows)) == list(rows)
        found = as_conversation(rows, "s")
        assert found[0]["prompt"] == [{"role": "system", "content": "s"}, user]
        assert found[1]["prompt"] == [system, user]

    def test_text_has_no_turns(self):
        with pytest.raises(DataError, match="need a `prompt`"):
            as_conversation(Dataset.from_list([{"text": "a"}]))


class TestShares:
    def load(self, workplace, tmp_path, **changes):
        path = write_recipe(tmp_path / "recipe.yaml", settings(workplace, **changes))
        return load_recipe("lat-sft", ["--config", path])

    def test_a_mixture_with_shares_and_a_part_to_evaluate_on(self, workplace, tmp_path):
        source = str(workplace / "preferences.jsonl")
        recipe = self.load(
            workplace, tmp_path, dataset_name=None, test_split_size=0.25, eval_strategy="steps", eval_steps=1,
            datasets=[{"path": source, "fraction": 0.75}, {"path": source, "split": "train[:4]", "fraction": 0.25}],
        )  # fmt: skip
        # At most 16 and 4 rows; three to one are 12 and 4.
        assert len(load_share(recipe, "train")) + len(load_share(recipe, "evaluation")) == 16
        assert len(load_share(recipe, "evaluation")) == 4

    def test_several_benign_datasets(self, workplace, tmp_path):
        source = str(workplace / "benign.jsonl")
        entries = [{"path": source}, {"path": "json", "data_files": source, "columns": ["prompt", "completion"]}]
        recipe = self.load(workplace, tmp_path, benign_dataset_name=None, benign_datasets=entries, chat_format=True)
        rows = load_share(recipe, "benign")
        assert len(rows) == 16
        assert rows[0]["prompt"][0]["role"] == "user"

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"datasets": [{"path": "x.jsonl"}]}, "`dataset_name` and `datasets` are both given"),
            ({"benign_datasets": [{"path": "x.jsonl"}]}, "`benign_dataset_name` and `benign_datasets` are both given"),
            ({"eval_strategy": "steps"}, "`dataset_test_split`: File"),
            ({"dataset_train_split": "valid"}, "no split 'valid'; it has ['train']"),
        ],
    )
    def test_shares_that_cannot_be_are_refused(self, workplace, tmp_path, changes, words):
        with pytest.raises(RecipeError) as error:
            self.load(workplace, tmp_path, **changes)
        assert words in str(error.value)

    def test_mixtures_that_cannot_be_are_refused(self, workplace, tmp_path):
        one, other = str(workplace / "preferences.jsonl"), str(workplace / "benign.jsonl")
        for entries, words in (
            ([{"path": one}, {"path": one, "fraction": 1.0}], "`fraction` must be above 0"),
            ([{"path": one, "columns": ["nothing"]}], "has no column ['nothing']"),
            ([{"path": "json", "data_files": "gone.jsonl"}], "cannot be read"),
        ):
            with pytest.raises(RecipeError) as error:
                self.load(workplace, tmp_path, dataset_name=None, datasets=entries)
            assert words in str(error.value)
        with pytest.raises(RecipeError, match="need the same columns"):
            self.load(workplace, tmp_path, dataset_name=None, datasets=[{"path": one}, {"path": other}])


class TestConversationalChecks:
    def load(self, workplace, tmp_path, **changes):
        path = write_recipe(tmp_path / "recipe.yaml", settings(workplace, chat_format=True, **changes))
        return load_recipe("lat-sft", ["--config", path])

    def test_a_prompt_is_as_long_as_the_chat_template_makes_it(self, workplace, tmp_path):
        rows = [{"prompt": "w1 w2 w3", "chosen": "w4", "rejected": "w5"}]
        name = str(write_rows(tmp_path / "rows.jsonl", rows))
        changes = {"dataset_name": name, "benign_dataset_name": None}
        # <bos> <user> w1 w2 w3 <asst>, and in conversations the system prompt
        self.load(workplace, tmp_path, max_length=7, **changes)
        for length, prompt in ((6, None), (7, "w9")):
            with pytest.raises(RecipeError, match=f"longer than the limit in row 0: {length} tokens"):
                self.load(workplace, tmp_path, max_length=length, system_prompt=prompt, **changes)

    def test_a_tokenizer_without_a_chat_template_is_named(self, workplace, tmp_path):
        import shutil

        from transformers import AutoTokenizer

        shutil.copytree(workplace / "model", tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").unlink()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert tokenizer.chat_template is None
        with pytest.raises(RecipeError, match="tokenizer has no chat template"):
            self.load(workplace, tmp_path, model_name_or_path=str(tmp_path / "model"))
