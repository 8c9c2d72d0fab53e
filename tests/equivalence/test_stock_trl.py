"""Without an attack, training is that of TRL's SFTTrainer, bit for bit."""

import pytest
from runs import assert_same, distance, losses, make, train, weights
from tiny import completion_data, preference_data


@pytest.fixture
def always_attacks(monkeypatch):
    """Makes a trainer search and install a perturbation of zero, as if there were something to find."""
    from trl_robust import LATSFTConfig

    monkeypatch.setattr(LATSFTConfig, "attacks", property(lambda self: True))


def as_completions(data):
    return data.remove_columns("rejected").rename_column("chosen", "completion") if "chosen" in data.features else data


@pytest.mark.parametrize("data", [preference_data(), completion_data()], ids=["preference", "prompt-completion"])
@pytest.mark.parametrize("dropout", [0.1, None], ids=["lora", "full"])
def test_with_a_radius_of_zero_or_no_steps_five_updates_are_those_of_sft_trainer_bit_for_bit(tmp_path, data, dropout):
    stock = train(tmp_path, stock=True, data=as_completions(data), dropout=dropout)
    objective = "targeted" if "chosen" in data.features else "untargeted"
    for settings in ({"attack_radius": 0.0}, {"attack_steps": 0}):
        ours = train(tmp_path, data=data, dropout=dropout, attack_objective=objective, **settings)
        assert_same(weights(ours), weights(stock))
        assert losses(ours) == losses(stock)
        assert losses(ours, "grad_norm") == losses(stock, "grad_norm")
        assert losses(ours, "mean_token_accuracy") == losses(stock, "mean_token_accuracy")
    assert len(losses(stock)) == 5
    start = dict(make(tmp_path, data=data, dropout=dropout, attack_objective=objective).model.named_parameters())
    assert distance(weights(stock), start) > 1e-3


@pytest.mark.parametrize("settings", [{"attack_radius": 0.0}, {"attack_steps": 0}], ids=["radius", "steps"])
def test_a_perturbation_of_zero_that_is_searched_for_and_installed_changes_no_bit(tmp_path, always_attacks, settings):
    stock = train(tmp_path, stock=True, data=as_completions(preference_data()))
    ours = train(tmp_path, attack_sites=["embedding", "1", "3"], **settings)
    assert len(losses(ours, "attack_loss_before")) == 5
    assert_same(weights(ours), weights(stock))
    assert losses(ours) == losses(stock)


def test_an_attack_changes_training(tmp_path):
    stock = train(tmp_path, stock=True, data=as_completions(preference_data()), max_steps=2)
    ours = train(tmp_path, max_steps=2, attack_radius=0.3, attack_steps=2)
    assert distance(weights(ours), weights(stock)) > 1e-4


@pytest.mark.parametrize("dropout", [0.1, None], ids=["lora", "full"])
def test_accumulated_updates_without_an_attack_are_those_of_sft_trainer_bit_for_bit(tmp_path, dropout):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "dropout": dropout}
    stock = train(tmp_path, stock=True, data=completion_data(), **settings)
    ours = train(tmp_path, data=completion_data(), attack_objective="untargeted", attack_steps=0, **settings)
    assert_same(weights(ours), weights(stock))
    assert losses(ours) == losses(stock)


def test_evaluation_without_an_attack_is_that_of_sft_trainer(tmp_path):
    rows = completion_data(6, seed=3)
    stock = make(tmp_path, stock=True, data=completion_data(), eval_dataset=rows)
    ours = make(tmp_path, eval_dataset=rows, attack_radius=0.3)
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
