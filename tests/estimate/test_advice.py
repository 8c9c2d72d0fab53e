from types import SimpleNamespace

import pytest

from trl_robust.estimate import advice as module
from trl_robust.estimate.memory import GIB

TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "activation_checkpointing": False,
    "updates_per_attack": 1,
    "attack_stream": "layer",
    "attacks": True,
    "faithful": False,
}
MODEL = {"use_peft": True, "load_in_4bit": False, "load_in_8bit": False, "dtype": "bfloat16"}


@pytest.fixture
def advised(monkeypatch):
    """Advice for a run of 10 GiB of weights and 10 GiB for every row, halved by the usual means."""

    def changed(found, training, model):
        training, model = vars(found.recipe.training) | training, vars(found.recipe.model) | model
        weights = 10 / (1 + model["load_in_4bit"])
        rows = 10 * training["per_device_train_batch_size"] / (1 + training["activation_checkpointing"])
        return SimpleNamespace(memory=SimpleNamespace(peak=(weights + rows) * GIB))

    monkeypatch.setattr(module, "changed", changed)

    def run(memory, **changes):
        training = SimpleNamespace(**TRAINING | {key: changes[key] for key in changes if key in TRAINING})
        model = SimpleNamespace(**MODEL | {key: changes[key] for key in changes if key in MODEL})
        found = SimpleNamespace(
            recipe=SimpleNamespace(training=training, model=model),
            blueprint=SimpleNamespace(peft_config="lora" if model.use_peft else None),
        )
        return module.advice(found, memory)

    return run


def test_every_change_that_is_enough_alone_is_named_with_what_is_left_and_what_it_costs(advised):
    assert [hint.partition(" (")[0] for hint in advised(30)] == [
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 4: 30.0 GiB",
        "--activation_checkpointing true: 30.0 GiB",
    ]
    assert [hint.split(":")[0] for hint in advised(45)][-1] == "--load_in_4bit true --use_bnb_nested_quant true"


def test_changes_are_put_together_where_none_is_enough_and_the_micro_batch_is_as_large_as_may_be(advised):
    assert advised(16) == [
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 8 --activation_checkpointing true: 15.0 GiB, "
        "none of these alone being enough"
    ]
    (hint,) = advised(10.5)
    assert hint.startswith("--per_device_train_batch_size 1 ")
    assert "--load_in_4bit true --use_bnb_nested_quant true: 10.0 GiB" in hint


def test_where_all_of_them_are_too_little_it_says_how_far_they_go(advised):
    first, last = advised(5)
    assert "together leave 10.0 GiB, which is still too much" in first
    assert last == "shorter rows (--max_length), or a smaller model"
    assert "train adapters (--use_peft true) instead of all weights" in advised(5, use_peft=False)


def test_perturbed_mlps_are_not_told_to_checkpoint_nor_quantised_weights_to_be_quantised(advised):
    assert advised(1, attack_stream="mlp", load_in_4bit=True, per_device_train_batch_size=1) == [
        "shorter rows (--max_length), or a smaller model"
    ]


def test_weights_in_float32_are_quantised_with_a_dtype(advised):
    assert "--load_in_4bit true --use_bnb_nested_quant true --dtype bfloat16" in advised(45, dtype="float32")[-1]


def test_fewer_updates_an_attack_come_last_and_a_faithful_run_is_warned(advised):
    assert advised(60, updates_per_attack=4)[-1].startswith(
        "--updates_per_attack 1: 50.0 GiB (no perturbation is kept"
    )
    assert "fewer rows are attacked" in advised(30, faithful=True)[0]
