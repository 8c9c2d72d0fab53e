"""Where a threat acts, in every architecture."""

import pytest
from tiny import ARCHITECTURES, HIDDEN, LAYERS, lora, shared_model, tiny_model
from torch import nn

from trl_robust.threat import UnsupportedModelError, decoder_layers, resolve_sites
from trl_robust.threat.sites import hidden_states, mlp_of, parse_site


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_layers_of_every_architecture_are_found(name):
    model = shared_model(name)
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    assert HIDDEN != 4096
    assert len({type(layer) for layer in layers}) == 1
    if name != "opt":  # whose layers hold their two matrices themselves
        assert isinstance(mlp_of(layers[0]), nn.Module)


def test_all_architectures_of_the_matrix_are_there():
    assert len(ARCHITECTURES) == 11
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox"} <= set(ARCHITECTURES)
    assert shared_model("qwen2").config.num_key_value_heads < shared_model("qwen2").config.num_attention_heads
    tied = {name: shared_model(name).config.tie_word_embeddings for name in ("llama", "qwen2")}
    assert tied == {"llama": False, "qwen2": True}


def test_the_layers_below_an_adapter_are_those_of_the_model():
    model = tiny_model()
    layers = decoder_layers(model)
    assert decoder_layers(lora(model)) is layers


def test_the_published_layers_are_fractions_of_the_depth():
    assert resolve_sites(["0.25", "0.5", "0.75", "0.94"], 32) == (8, 16, 24, 30)
    assert resolve_sites([0.25, 0.5, 0.75, 0.94], 32) == (8, 16, 24, 30)


def test_sites_are_read_as_recipes_and_command_lines_write_them():
    assert resolve_sites(["embedding", "8", 16, "-1", "0.75"], 32) == ("embedding", 8, 16, 24, 31)
    assert parse_site(" 1.0 ") == 1.0 and parse_site("1") == 1


def test_negative_layers_count_from_the_end():
    assert resolve_sites([-1, -4], 4) == (0, 3)


def test_fractions_reach_from_the_first_layer_to_the_last():
    assert resolve_sites([0.0, 1.0], 32) == (0, 31)


def test_sites_come_in_the_order_in_which_they_run_and_once_each():
    assert resolve_sites([3, 1, "embedding", -1, 0.25], 4) == ("embedding", 1, 3)


@pytest.mark.parametrize("layer", [4, -5, "32"])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(layer):
    with pytest.raises(ValueError, match=r"does not exist: the model has 4 layers, numbered 0 to 3 \(or -4 to -1\)"):
        resolve_sites([layer], 4)


@pytest.mark.parametrize("site", [1.5, -0.1, "1.01", float("nan")])
def test_a_fraction_outside_the_depth_is_refused(site):
    with pytest.raises(ValueError, match=r"between 0\.0 and 1\.0"):
        parse_site(site)


@pytest.mark.parametrize("site", ["embeddings", "", "layer 3", True, None, [3]])
def test_anything_else_is_refused_with_what_a_site_is(site):
    with pytest.raises(ValueError, match="A site is `embedding`, the index of a layer"):
        parse_site(site)


def test_a_model_without_decoder_layers_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers causal language model"):
        decoder_layers(nn.Linear(2, 2))


def test_a_stack_that_cannot_be_told_from_another_is_refused():
    model = tiny_model()
    model.model.twin = nn.ModuleList(model.model.layers)
    with pytest.raises(UnsupportedModelError, match="2 stacks of 4 decoder layers"):
        decoder_layers(model)


def test_a_layer_without_an_mlp_of_a_known_name_says_what_to_use_instead():
    with pytest.raises(UnsupportedModelError, match="Use `stream='layer'`"):
        mlp_of(decoder_layers(shared_model("opt"))[0])


def test_hidden_states_are_found_in_tensors_and_in_tuples(llama):
    states = llama.get_input_embeddings().weight[None, :3]
    assert hidden_states(states) is states
    assert hidden_states((states, "cache")) is states
    with pytest.raises(UnsupportedModelError, match="Use `stream='layer'`"):
        hidden_states(states[0])
