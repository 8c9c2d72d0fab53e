"""The model on the meta device: its parameters, and where its configuration is from."""

import pytest
import torch
from cost import estimated, recipe_values
from peft import LoraConfig, get_peft_model
from recipe_parts import write_recipe
from tiny import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM

from trl_robust.estimate import find_config
from trl_robust.estimate.shapes import SHAPES, Blueprint, shape_of
from trl_robust.recipes import RecipeError, load_recipe

PUBLISHED = {
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,  # Mistral-7B
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_shapes_gives_the_published_totals(name):
    kind, shape = SHAPES[name]
    assert shape_of(Blueprint(kind(**shape), torch.bfloat16).model()).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_a_real_model(name):
    model = tiny_model(name)
    found = shape_of(Blueprint(model.config, torch.float32).model())
    assert found.parameters == found.trained == sum(p.numel() for p in model.parameters())
    assert found.depth == model.config.get_text_config().num_hidden_layers
    in_layers = sum(layer.total for layer in found.layers)
    assert 0 < in_layers <= found.parameters


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_have_as_many_parameters_as_pefts(modules):
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
    model = tiny_model("llama")
    found = shape_of(Blueprint(model.config, torch.float32, peft_config=config).model())
    real = get_peft_model(model, config)
    trained, everything = real.get_nb_trainable_parameters()
    assert found.trained == trained
    assert found.parameters == everything - trained


def test_adapters_of_a_quantised_model_are_bfloat16_and_others_float32():
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for quantized, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model = Blueprint(tiny_model("llama").config, torch.bfloat16, quantized, peft_config=config).model()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_only_the_chosen_modules_of_the_chosen_layers_are_trained():
    config = tiny_model("llama").config
    found = shape_of(
        Blueprint(config, torch.float32, trained_layers=("1", "2"), trained_modules=("down_proj",)).model()
    )
    assert found.trained == 2 * config.hidden_size * config.intermediate_size
    assert [layer.trained > 0 for layer in found.layers] == [False, True, True, False]


class TestConfig:
    @pytest.fixture
    def recipe(self, workplace, tmp_path):
        def load(**changes):
            path = write_recipe(tmp_path / "recipe.yaml", recipe_values(workplace, "lat-sft", **changes))
            return load_recipe("lat-sft", ["--config", path], this_machine=False)

        return load

    def test_it_is_the_folders_own(self, recipe):
        config, origin = find_config(recipe())
        assert (config.num_hidden_layers, origin) == (6, "its own configuration")

    def test_it_is_from_the_table_where_nothing_else_is_here_and_says_so(self, recipe):
        config, origin = find_config(recipe(model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct"))
        assert config.vocab_size == 128256
        assert "our table" in origin

    @pytest.mark.parametrize("as_file", [True, False])
    def test_one_given_by_hand_comes_before_all_others(self, recipe, tmp_path, as_file):
        tiny_model("gpt2").config.save_pretrained(tmp_path / "given")
        given = tmp_path / "given" / "config.json" if as_file else tmp_path / "given"
        assert find_config(recipe(), str(given))[0].model_type == "gpt2"

    @pytest.mark.usefixtures("without_rehearsal")
    def test_an_adapter_has_that_of_its_base_and_is_trained_further(self, workplace, tmp_path):
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(workplace / "model")
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        values = recipe_values(workplace, "lat-dpo", model_name_or_path=str(tmp_path / "adapter"))
        found = estimated("lat-dpo", write_recipe(tmp_path / "recipe.yaml", values))
        assert found.shape.depth == 6
        assert found.shape.trained == 6 * 4 * (64 + 64)
        assert found.memory.of("reference").name == "reference (a copy of the adapter)"

    def test_an_unknown_model_is_asked_for_a_copy(self, recipe):
        with pytest.raises(RecipeError, match=r"some/model is neither .*`--model_config FOLDER_OR_JSON`"):
            find_config(recipe(model_name_or_path="some/model"))

    @pytest.mark.parametrize(
        ("content", "words"), [(None, "does not exist"), ("{", "is not a model's configuration"), ("{}", "model_type")]
    )
    def test_one_that_cannot_be_used_is_refused(self, recipe, tmp_path, content, words):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(RecipeError, match=words):
            find_config(recipe(), str(tmp_path / "config.json"))
