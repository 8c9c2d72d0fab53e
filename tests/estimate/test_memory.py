"""Bytes against those of real tensors, and what a rehearsal sees."""

import pytest
import torch
from cost import estimated, recipe_values
from peft import LoraConfig
from recipe_parts import write_recipe
from tiny import tiny_model
from transformers import LlamaConfig

from trl_robust.estimate import rehearsal
from trl_robust.estimate.lengths import Lengths, Rows
from trl_robust.estimate.memory import optimizer_bytes
from trl_robust.estimate.rehearsal import Modes, Rehearsal
from trl_robust.estimate.shapes import Blueprint

ROWS, WIDTH, LABELS, HIDDEN = 3, 40, 10, 32
LENGTHS = Lengths(ROWS, WIDTH, ROWS * LABELS, WIDTH - LABELS)
OUTER = [(("fused",), LENGTHS), (("away",), LENGTHS), (("toward", "kl"), LENGTHS)]


def rehearsed(depth=8, *, lora=False, autocast=None, checkpointing=False, vocabulary=500):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    return Rehearsal(Blueprint(config, torch.float32, peft_config=peft), Modes(autocast, checkpointing, on_cpu=False))


@pytest.mark.parametrize(
    ("phase", "lora", "checkpointing"), [("attack", True, True), ("outer", True, False), ("outer", False, True)]
)
def test_a_straight_line_through_one_and_two_layers_meets_four(phase, lora, checkpointing, monkeypatch):
    def run():
        on = rehearsed(4, lora=lora, autocast=torch.bfloat16, checkpointing=checkpointing)
        return on.attack(4, LENGTHS, "away") if phase == "attack" else on.outer(4, OUTER)

    short = run()
    monkeypatch.setattr(rehearsal, "through_depths", lambda measure, depth: measure(depth))
    whole = run()
    assert (short.layers, short.losses, short.peak) == pytest.approx(
        (whole.layers, whole.losses, whole.peak), rel=0.01
    )
    assert short.peak >= short.layers + short.losses > 0


def test_with_checkpointing_little_more_than_the_inputs_of_the_layers_waits():
    inputs = 8 * ROWS * WIDTH * HIDDEN * 4
    assert inputs <= rehearsed(checkpointing=True).outer(8, OUTER[:1]).layers < 1.6 * inputs
    assert rehearsed().outer(8, OUTER[:1]).layers > 8 * inputs


def test_logits_are_held_at_labelled_positions_alone_and_not_at_all_by_the_fused_head():
    vocabulary = 5000
    logits = ROWS * LABELS * vocabulary * 4
    on = rehearsed(vocabulary=vocabulary)
    assert logits <= on.outer(8, OUTER[1:2]).losses < 4 * logits
    assert on.outer(8, OUTER[:1]).losses < logits / 100


def test_frozen_weights_keep_less_and_an_attack_above_a_cached_prefix_less_still():
    on = rehearsed()
    attack = on.attack(8, LENGTHS, "toward").layers
    assert attack < on.outer(8, [(("toward",), LENGTHS)]).layers
    assert on.attack(2, LENGTHS, "toward").layers == pytest.approx(attack / 4, rel=0.1)


def test_all_terms_of_an_update_wait_for_one_backward_pass():
    on = rehearsed()
    apart = [on.outer(8, [term]).layers for term in OUTER]
    assert on.outer(8, OUTER).layers == pytest.approx(sum(apart), rel=0.02)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimisers_state_is_that_of_the_real_one(name, make, dtype):
    parameters = [torch.nn.Parameter(torch.ones(64, 32, dtype=dtype)), torch.nn.Parameter(torch.ones(7, dtype=dtype))]
    optimizer = make(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, torch.Tensor) and t.dim()]
    assert optimizer_bytes(name, parameters) == sum(t.numel() * t.element_size() for t in state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("without_rehearsal")
def test_four_bit_weights_are_as_large_as_those_of_bitsandbytes(nested, workplace, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    values = recipe_values(
        workplace, "lat-sft", load_in_4bit=True, use_bnb_nested_quant=nested, use_peft=True, dtype="bfloat16"
    )
    found = estimated("lat-sft", write_recipe(tmp_path / "recipe.yaml", values))
    real = 0
    model = tiny_model("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=6).to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = bnb.functional.quantize_4bit(
                module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=nested
            )
            real += packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
        elif not isinstance(module, torch.nn.Linear):
            real += sum(p.nbytes for p in module.parameters(recurse=False))
    real += model.lm_head.weight.nbytes
    # Scales of scales are rounded up in every matrix.
    assert found.memory.of("weights").attack == pytest.approx(real, rel=0.01)


def lines(workplace, tmp_path, verb="lat-sft", **changes):
    path = write_recipe(tmp_path / "recipe.yaml", recipe_values(workplace, verb, **changes))
    found = estimated(verb, path)
    return {line.name.split(" (")[0]: (line.attack, line.update) for line in found.memory.lines}, found


@pytest.mark.usefixtures("without_rehearsal")
def test_what_is_always_there_and_what_only_at_times(workplace, tmp_path):
    found, estimate = lines(workplace, tmp_path, kl_coef=0.1)
    trained = 4 * estimate.shape.trained
    assert found["weights"] == (trained, trained)
    assert found["optimiser state"] == (2 * trained, 2 * trained)
    assert found["reference"] == (trained, trained)
    assert found["gradients"] == (0, trained)  # set to nothing between updates
    assert lines(workplace, tmp_path, gradient_accumulation_steps=2)[0]["gradients"] == (trained, trained)
    assert lines(workplace, tmp_path)[0]["reference"] == (0, 0)


@pytest.mark.usefixtures("without_rehearsal")
def test_adapters_need_no_second_model_and_dpo_of_all_weights_does(workplace, tmp_path):
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    for verb, changes, kind in (
        ("lat-sft", {"kl_coef": 0.1, **lora}, "reference (adapters off)"),
        ("lat-dpo", lora, "reference (adapters off)"),
        ("lat-dpo", {"precompute_ref_log_probs": True}, "reference (precomputed)"),
        ("lat-dpo", {}, "reference (a second model)"),
        ("lat-rmu", {"rmu_layer": "3", "attack_sites": [2]}, "reference (copies of trained weights)"),
    ):
        _, found = lines(workplace, tmp_path, verb, **changes)
        line = found.memory.of("reference")
        assert line.name == kind
        size = {"a second": 4 * found.shape.parameters, "copies": 4 * found.shape.trained}
        assert line.update == next((bytes_ for word, bytes_ in size.items() if word in kind), 0)


@pytest.mark.usefixtures("without_rehearsal")
def test_perturbations_are_deltas_gradients_and_moments_at_every_site_and_are_kept_for_later_updates(
    workplace, tmp_path
):
    one = 4 * 2 * 12 * 64  # float32 x rows x tokens of a prompt x hidden
    assert lines(workplace, tmp_path)[0]["perturbations"] == (2 * 3 * one, 2 * one)
    adamw = {"attack_optimizer": "adamw", "attack_learning_rate": 1.0}
    assert lines(workplace, tmp_path, **adamw)[0]["perturbations"] == (2 * 5 * one, 2 * one)
    held = lines(workplace, tmp_path, updates_per_attack=2, gradient_accumulation_steps=4)[0]["perturbations"]
    assert held == (2 * 3 * one + 4 * 2 * one, 4 * 2 * one)
    cached = 4 * 2 * (12 + 8) * 64  # of the rejected rows, 12 + 7 tokens and an end
    assert lines(workplace, tmp_path, attack_sites=[1])[0]["perturbations"] == (3 * one + cached, one)


def test_batches_are_as_wide_as_their_longest_row():
    rows = Rows({"chosen": [(4, 3), (2, 2), (0, 9)], "rejected": [(4, 1), (2, 6), (0, 2)]}, "")
    assert rows.batches("chosen", 2) == [Lengths(2, 7, 5), Lengths(2, 9, 8 + 3)]
    assert rows.batches("pair", 4)[0] == Lengths(4, 8, 3 + 2 + 1 + 6)
    assert rows.longest("pair", 4, "prompt") == Lengths(4, 9, 4 * 8, 4)
    assert rows.longest("rejected", 2, "all") == Lengths(2, 8, 2 * 6, 9)
