import dataclasses
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_parts import line_of, settings, write_recipe

from trl_robust.recipes import RecipeError, load_recipe, recipe_text, resolved_recipe
from trl_robust.recipes.arguments import PARTS
from trl_robust.recipes.launching import launch_arguments, launch_options
from trl_robust.recipes.loading import RENAMED

FIELDS = sorted(field.name for part in PARTS.values() for field in dataclasses.fields(part("lat-sft")) if field.init)


def load(*words, **options):
    return load_recipe("lat-sft", [str(word) for word in words], **options)


def faults_of(*words, **options):
    with pytest.raises(RecipeError) as error:
        load(*words, **options)
    return error.value.faults


@pytest.fixture
def recipe(workplace, tmp_path):
    """Writes a recipe with some changes and returns its path."""

    def write(**changes):
        return write_recipe(tmp_path / "recipe.yaml", settings(workplace, output_dir=str(tmp_path / "run"), **changes))

    return write


class TestKeys:
    @given(st.sampled_from(FIELDS), st.sampled_from(["insert", "delete", "replace", "swap"]), st.data())
    def test_any_field_misspelt_by_one_letter_is_refused_and_the_right_one_suggested(self, name, edit, data):
        at = data.draw(st.integers(0, len(name) - 2))
        letter = data.draw(st.sampled_from(string.ascii_lowercase))
        misspelt = {
            "insert": name[:at] + letter + name[at:],
            "delete": name[:at] + name[at + 1 :],
            "replace": name[:at] + letter + name[at + 1 :],
            "swap": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        }[edit]
        if misspelt in {*FIELDS, *launch_options(), *RENAMED, "config", "verb", "env"} or not misspelt[0].isalpha():
            return
        found = [fault for fault in faults_of(f"--{misspelt}", "1", check=False) if f"`--{misspelt}`" in fault]
        assert len(found) == 1
        assert f"`{name}`" in found[0].partition("did you mean")[2]

    def test_the_field_names_of_all_parts_are_disjoint(self):
        assert len(FIELDS) == len(set(FIELDS)) > 150

    def test_names_of_earlier_versions_say_what_became_of_them(self, recipe):
        path = recipe(torch_dtype="bfloat16")
        (fault,) = faults_of("--config", path)
        assert f"`torch_dtype` (line {line_of(path, 'torch_dtype')}) is not a key here. Write `dtype`." in fault

    def test_a_recipe_for_another_verb_is_refused(self, recipe):
        assert load("--config", recipe(verb="lat-sft")).verb == "lat-sft"
        (fault,) = faults_of("--config", recipe(verb="lat-dpo"))
        assert "`verb` is lat-dpo" in fault


class TestFile:
    @pytest.mark.parametrize(
        "text, words",
        [
            ("", "empty"),
            ("- a\n- b\n", "a list; a recipe is a mapping"),
            ("learning_rate\n", "a single value"),
            ("a: 1\n b: 2\n", "Line 2, column 3 is not valid YAML"),
            ("a: [1, 2\nb: 3\n", "is not valid YAML"),
            ("a: !!python/object:os.system {}\n", "is not valid YAML"),
            ("a: 1\n---\nb: 2\n", "is not valid YAML"),
        ],
    )
    def test_what_is_no_recipe_is_refused_in_one_sentence(self, tmp_path, text, words):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        (fault,) = faults_of("--config", path)
        assert words in fault

    def test_a_file_that_is_not_there_or_not_text(self, tmp_path):
        (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
        assert "There is no recipe at" in faults_of("--config", tmp_path / "gone.yaml")[0]
        assert "not UTF-8" in faults_of("--config", tmp_path / "latin.yaml")[0]
        assert "cannot be read" in faults_of("--config", tmp_path)[0]
        assert "needs the path" in faults_of("--config", check=False)[0]

    def test_a_key_given_twice_is_refused_with_both_lines(self, recipe):
        path = recipe()
        first = line_of(path, "max_steps")
        with open(path, "a", encoding="utf-8") as file:
            file.write("max_steps: 3\nmodel_init_kwargs: {a: 1, a: 2}\n")
        faults = faults_of("--config", path)
        second = line_of(path, "max_steps")
        assert f"`max_steps` is given twice, in lines {first} and {second}. Keep one." in faults
        assert any("`a` is given twice" in fault for fault in faults)

    def test_a_key_that_yaml_reads_as_a_value_is_refused(self, recipe):
        path = recipe()
        with open(path, "a", encoding="utf-8") as file:
            file.write("on: 3\n")
        assert "True is not a key" in faults_of("--config", path)[0]

    def test_environment_variables_are_kept_apart(self, recipe):
        assert load("--config", recipe(env={"A": 1})).environment == {"A": "1"}
        assert "`env`" in faults_of("--config", recipe(env=["A"]))[0]


class TestCommandLine:
    def test_it_beats_the_file(self, recipe):
        loaded = load("--config", recipe(), "--max_steps", 7, "--attack_sites", "embedding", -1, "--attack-radius=2")
        assert loaded.training.max_steps == 7
        assert loaded.training.attack_sites == ["embedding", "-1"]
        assert loaded.training.attack_radius == 2

    def test_switches(self, recipe):
        loaded = load("--config", recipe(), "--use_peft", "--no_bf16", "--average_tokens_across_devices", "false")
        assert loaded.model.use_peft is True
        assert loaded.training.average_tokens_across_devices is False

    def test_a_key_without_its_value_and_a_word_without_its_key_are_refused(self, recipe):
        faults = faults_of("stray", "--config", recipe(), "--max_steps")
        assert "`stray` stands alone" in faults[0]
        assert "`max_steps` (command line) is empty; a value is needed" in faults[1]

    def test_a_recipe_is_not_needed(self, workplace, tmp_path):
        words = []
        for key, value in settings(workplace, output_dir=tmp_path / "run").items():
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        assert load(*words).training.learning_rate == 1e-3

    def test_the_model_runs_no_code_of_its_own_unless_allowed(self, recipe):
        assert load("--config", recipe()).training.trust_remote_code is False


class TestTraps:
    def test_an_unquoted_no_and_a_number_without_a_point(self, tmp_path, workplace):
        path = tmp_path / "recipe.yaml"
        text = yaml.safe_dump(settings(workplace, save_strategy=None, learning_rate=None))
        path.write_text(text + "save_strategy: no\nlearning_rate: 1e-4\n")
        loaded = load("--config", path)
        assert loaded.training.save_strategy == "no"
        assert loaded.training.learning_rate == 1e-4

    def test_all_faults_of_a_recipe_are_in_one_message(self, recipe):
        path = recipe(
            attack_radus=3, attack_steps="many", attack_radius=-1, attack_sites=["embedding", 9], packing=True,
            torch_compile=True, activation_checkpointing_kwargs={"use_reentrant": True}, dataset_name="gone.jsonl",
            max_length=4, optim="adamw_foo", load_in_4bit=True,
        )  # fmt: skip
        with pytest.raises(RecipeError) as error:
            load("--config", path)
        message = str(error.value)
        assert message.startswith(f"{path} has 11 faults:\n- ")
        for words in (
            f"`attack_radus` (line {line_of(path, 'attack_radus')}) is not a key; did you mean `attack_radius`?",
            f"`attack_steps` (line {line_of(path, 'attack_steps')}) is 'many'; a whole number is needed.",
            "`attack_radius` is -1;",
            "`attack_sites`: Layer 9 does not exist: the model has 4 layers",
            "Set `packing: false`.",
            "Set `torch_compile: false`.",
            "Set `use_reentrant: false`.",
            "`dataset_name`: There is no dataset gone.jsonl",
            "`benign_dataset_name`: The benign dataset has a prompt longer than the limit in",
            f"`optim` (line {line_of(path, 'optim')}) is 'adamw_foo'",
            "Set `use_peft: true`.",
        ):
            assert words in message, words

    def test_settings_that_leave_something_out(self, recipe):
        faults = faults_of("--config", recipe(model_name_or_path=None, dataset_name=None, benign_dataset_name=None,
                                              kl_coef=0.1, dataset_streaming=True))  # fmt: skip
        for words in (
            "`model_name_or_path` is missing",
            "`dataset_name` is missing",
            "`kl_coef` is 0.1",
            "_streaming",
        ):
            assert sum(words in fault for fault in faults) == 1

    def test_a_gpu_recipe_is_no_fault_where_there_is_none_if_it_is_not_to_run_here(self, recipe):
        path = recipe(use_cpu=None, bf16=None)
        (fault,) = faults_of("--config", path)
        assert "Set `use_cpu: true` to train on the CPU" in fault
        load("--config", path, this_machine=False)


class TestHub:
    def test_hub_ids_are_noted_and_not_asked_for(self, recipe):
        path = recipe(model_name_or_path="org/model", dataset_name="org/rows", benign_dataset_name="org/other")
        notes = load("--config", path).notes
        assert notes == [
            "not checked: `model_name_or_path` org/model is a hub id",
            "not checked: `dataset_name` org/rows is a hub id",
            "not checked: `benign_dataset_name` org/other is a hub id",
        ]


class TestLauncher:
    def test_launch_keys_are_kept_apart(self, recipe):
        path = recipe(num_processes=2, accelerate_config="multi_gpu", same_network=True)
        loaded = load("--config", path, "--main_process_port", 29501, "--max_steps", 3)
        assert loaded.launch == {
            "num_processes": 2,
            "accelerate_config": "multi_gpu",
            "same_network": True,
            "main_process_port": 29501,
        }
        assert loaded.argv == ["--config", path, "--max_steps", "3"]
        words = launch_arguments(loaded.launch)
        assert words[0] == "--config_file"
        assert words[1].endswith("trl/accelerate_configs/multi_gpu.yaml")
        assert words[2:] == ["--num_processes", "2", "--same_network", "--main_process_port", "29501"]

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"num_processes": "two"}, "is 'two'; a whole number is needed"),
            ({"accelerate_config": "fsdp2"}, "asks for FSDP, which is not supported"),
            ({"accelerate_config": "zero3"}, "asks for DEEPSPEED, which is not supported"),
            ({"accelerate_config": "gone"}, "neither a file nor one of fsdp1, fsdp2, multi_gpu, single_gpu"),
            ({"use_fsdp": True}, "`use_fsdp` is not supported"),
            ({"dynamo_backend": "inductor"}, "ignores every perturbation"),
        ],
    )
    def test_what_a_launch_cannot_be_is_refused(self, recipe, changes, words):
        (fault,) = faults_of("--config", recipe(**changes))
        assert words in fault


class TestResolved:
    CHANGES = {
        "attack_sites": ["embedding", 0.25, -1],
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "learning_rate": "5e-4",
        "num_processes": 2,
        "env": {"A": "1"},
        "system_prompt": "w1 w2\nw3",
        "chat_format": True,
        "lr_scheduler_type": "cosine",
        "report_to": ["none"],
        "gradient_checkpointing": False,
        "hub_token": "hf_abc",
    }

    def test_it_loads_again_to_the_same_values(self, recipe, tmp_path):
        loaded = load("--config", recipe(**self.CHANGES), "--max_steps", 3)
        (tmp_path / "again.yaml").write_text(recipe_text(resolved_recipe(loaded)), encoding="utf-8")
        again = load("--config", tmp_path / "again.yaml")
        for part in PARTS:
            one, other = (dict(vars(getattr(side, part))) for side in (loaded, again))
            for values in (one, other):
                values.pop("hub_token", None)
                # Objects that transformers makes; they compare by identity.
                values.pop("distributed_state", None)
            assert one == other
        assert (loaded.launch, loaded.environment) == (again.launch, again.environment)
        assert resolved_recipe(again) == resolved_recipe(loaded)

    def test_no_secret_is_written_and_resuming_is_no_part_of_a_run(self, recipe):
        text = recipe_text(resolved_recipe(load("--config", recipe(**self.CHANGES, resume_from_checkpoint=True))))
        assert "hf_abc" not in text
        assert "resume_from" not in text
        assert text.startswith("# As resolved by trl-robust")
