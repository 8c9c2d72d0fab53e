"""What the data, the model's folder and the numbers have wrong: one fault each, before anything is loaded."""

import json
import shutil

import pytest
from recipe_parts import settings, write_recipe, write_rows

from trl_robust.recipes import RecipeError, load_recipe

PAIR = {"prompt": "w1", "completion": "w2"}
UNTARGETED = {"attack_objective": "untargeted", "away_coef": 0, "benign_dataset_name": None}


@pytest.fixture
def load(workplace, tmp_path):
    def load(*words, rows=None, **changes):
        if rows is not None:
            changes["dataset_name"] = str(write_rows(tmp_path / "rows.jsonl", rows))
        path = write_recipe(tmp_path / "recipe.yaml", settings(workplace, **changes))
        return load_recipe("lat-sft", ["--config", path, *words])

    return load


@pytest.fixture
def fault(load):
    """The one fault of a recipe."""

    def fault(*words, **changes):
        with pytest.raises(RecipeError) as error:
            load(*words, **changes)
        (found,) = error.value.faults
        return found

    return fault


class TestData:
    @pytest.mark.parametrize("plain", [{"chat_format": True}, {}])
    @pytest.mark.parametrize("prompt", [3, ["w1"], {"a": "b"}, [{"content": "w1"}]])
    def test_cells_that_are_neither_text_nor_messages(self, fault, prompt, plain):
        rows = [{"prompt": prompt, "chosen": "w1", "rejected": "w2"}]
        assert "needs text, or a list of messages" in fault(rows=rows, benign_dataset_name=None, **plain)

    def test_text_beside_messages(self, fault):
        rows = [{"prompt": "w1", "chosen": [{"role": "assistant", "content": "w1"}], "rejected": "w2"}]
        assert "all columns and rows must be of one kind" in fault(rows=rows)

    def test_a_template_that_does_not_take_a_content_is_no_crash(self, fault):
        messages = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
        rows = [{"prompt": messages, "completion": [{"role": "assistant", "content": "w2"}]}]
        assert "chat template does not take these rows" in fault(rows=rows, **UNTARGETED)

    @pytest.mark.parametrize("row", [{"text": "w1"}, {"messages": [{"role": "user", "content": "w1"}]}])
    @pytest.mark.parametrize("positions", ["prompt", "last_user"])
    def test_an_attack_on_prompts_needs_prompts(self, load, fault, row, positions):
        assert "`attack_positions: all`" in fault(rows=[row], attack_positions=positions, **UNTARGETED)
        load(rows=[row], attack_positions="all", **UNTARGETED)
        load(rows=[row], attack_positions=positions, **UNTARGETED | {"attack_radius": 0})

    def test_an_attack_on_prompts_needs_them_told_from_completions(self, load, fault):
        assert "`completion_only_loss: false` trains on prompts" in fault(completion_only_loss=False)
        load(completion_only_loss=False, attack_positions="all")

    def test_a_system_prompt_for_plain_rows_needs_chat_format(self, load, fault):
        assert "Set `chat_format: true`" in fault(system_prompt="w1", benign_dataset_name=None)
        load(system_prompt="w1", chat_format=True)
        messages = {key: [{"role": "user", "content": value}] for key, value in PAIR.items()}
        load(system_prompt="w1", rows=[messages], **UNTARGETED)

    def test_another_text_field(self, load, fault):
        assert "`dataset_text_field` is body; only `text` is read" in fault(dataset_text_field="body")
        load(dataset_text_field="text")


class TestModel:
    @pytest.fixture
    def model(self, workplace, tmp_path):
        return shutil.copytree(workplace / "model", tmp_path / "model")

    def test_an_adapter_is_trained_further_and_not_beside_a_new_one(self, load, fault, workplace, tmp_path):
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(workplace / "model")}))
        assert not [note for note in load(model_name_or_path=str(folder)).notes if note.startswith("not checked")]
        assert "Remove `use_peft`" in fault(model_name_or_path=str(folder), use_peft=True)
        assert "`attack_sites`: Layer 99 does not exist" in fault(model_name_or_path=str(folder), attack_sites=[99])
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
        assert "an adapter of the model" in fault(model_name_or_path=str(folder))
        (folder / "adapter_config.json").write_text("{}")
        assert "its adapter_config.json cannot be used" in fault(model_name_or_path=str(folder))

    def test_a_folder_without_a_tokenizer(self, fault, model):
        for path in model.glob("*token*"):
            path.unlink()
        found = fault(model_name_or_path=str(model))
        assert found.startswith(f"`model_name_or_path` is {model}")
        assert "Save the tokenizer beside the model" in found

    def test_a_file(self, fault, model):
        assert f"{model / 'config.json'} is a file" in fault(model_name_or_path=str(model / "config.json"))

    @pytest.mark.parametrize("name", ["gone.jinja", "./gone", "/gone/template.j2"])
    def test_a_chat_template_that_is_not_there(self, fault, name):
        found = fault(chat_template_path=name, chat_format=True)
        assert f"`chat_template_path` is {name}, and " in found
        assert "does not exist" in found

    def test_a_chat_template_of_another_name_and_below_home(self, load, fault, model, tmp_path, monkeypatch):
        template = model / "chat_template.jinja"
        load(chat_template_path=str(template), chat_format=True)
        load(chat_template_path=str(model), chat_format=True)
        load(chat_template_path="org/model", chat_format=True)
        monkeypatch.setenv("HOME", str(model))
        assert f"Write {template}" in fault(chat_template_path="~/chat_template.jinja")
        template.rename(tmp_path / "template.txt")
        assert "neither in .jinja nor in .j2" in fault(chat_template_path=str(tmp_path / "template.txt"))


class TestRanges:
    @pytest.mark.parametrize(
        ("key", "value", "needed"),
        [
            ("learning_rate", -0.1, "at least 0"),
            ("learning_rate", float("inf"), "at least 0"),
            ("per_device_train_batch_size", 0, "at least 1"),
            ("per_device_eval_batch_size", -1, "at least 1"),
            ("gradient_accumulation_steps", 0, "at least 1"),
            ("max_length", 0, "at least 1"),
            ("seed", -1, "from 0 to 4294967295"),
            ("seed", 2**32, "from 0 to 4294967295"),
        ],
    )
    def test_a_number_that_cannot_be_is_named_with_its_key(self, fault, key, value, needed):
        assert fault(**{key: value}) == f"`{key}` is {value}; it must be {needed}."

    def test_the_ends_of_the_ranges(self, load):
        load(learning_rate=0, per_device_eval_batch_size=1, gradient_accumulation_steps=1, seed=2**32 - 1)
        load(per_device_train_batch_size=1, seed=0, max_length=None)

    def test_rows_that_do_not_fill_a_batch_cannot_be_repeated(self, load, fault):
        changes = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
        }  # 16, and so many rows there are
        load(**changes, updates_per_attack=2)
        load(**changes | {"per_device_train_batch_size": 5})
        found = fault(**changes | {"per_device_train_batch_size": 5}, updates_per_attack=2)
        assert "`dataset_name` has 16 rows, and one update takes 20 (" in found
        assert "one update takes 32 (" in fault("--num_processes", "2", **changes, updates_per_attack=2)
