"""One update: what is attacked, what is added up, what reaches the optimiser."""

import pytest
import torch
from runs import ATTACK, EVERYTHING, STOCK, assert_same, benign_data, distance, losses, make, train, trained, weights
from tiny import completion_data, lora, preference_data, tiny_model
from transformers import TrainerCallback

from trl_robust.data import DataError
from trl_robust.inner import Perturbation
from trl_robust.objectives import label_logits
from trl_robust.threat import decoder_layers, ranks
from trl_robust.trainers import adversary
from trl_robust.trainers.held import load_held, save_held

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "dropout": 0.0}


@pytest.fixture
def searches(monkeypatch):
    """Every search: the batch that it was given, and the perturbation found."""
    made = []
    real = adversary.find_perturbation

    def find(model, batch, threat, **settings):
        found = real(model, batch, threat, **settings)
        made.append((batch, found))
        return found

    monkeypatch.setattr(adversary, "find_perturbation", find)
    return made


def watch_layer(trainer, layer):
    """
    What every forward pass of training adds between a layer's output and the next layer's input.

    The hook of the layer is registered before any perturbation's, so it sees the output as it was.
    """
    seen, clean = [], []
    layers = decoder_layers(trainer.model)
    layers[layer].register_forward_hook(lambda module, args, output: clean.append(output.detach()))

    def compare(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        if trainer.model.training:  # not in the search, which runs in evaluation mode
            seen.append(states.detach() - clean[-1])

    layers[layer + 1].register_forward_pre_hook(compare, with_kwargs=True)
    return seen


@pytest.mark.parametrize("changes", [{}, {"attack_optimizer": "steepest"}, {"attack_objective": "untargeted"}])
@pytest.mark.parametrize("attack", [ATTACK, EVERYTHING], ids=["attack", "attack-benign-kl"])
def test_lat_9_3_four_micro_batches_of_one_give_the_update_of_one_batch_of_four(tmp_path, changes, attack):
    settings = {**attack, **SGD, **changes, "benign": benign_data()}
    if changes.get("attack_objective") == "untargeted":
        settings["attack_away_coef"] = 0.0
    # Adapters away from zero, or the first update would teach only half of them and the KL term would be zero.
    start = trained(make(tmp_path, **{**settings, "dropout": None, "model": lora(tiny_model())}))
    updates, logged = [], []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = train(
            tmp_path,
            **{**settings, "dropout": None, "model": lora(tiny_model())},
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        after = trained(trainer)
        updates.append({name: after[name] - value for name, value in start.items()})
        logged.append(trainer.state.log_history[0])
    assert max(update.abs().max() for update in updates[0].values()) > 1e-3
    for update, log in zip(updates[1:], logged[1:], strict=True):
        assert distance(update, updates[0]) < 1e-5
        assert log["loss"] == pytest.approx(logged[0]["loss"], rel=1e-5)
        assert log["grad_norm"] == pytest.approx(logged[0]["grad_norm"], rel=1e-5)


def test_lat_9_3_every_micro_batch_of_an_accumulated_step_is_trained_under_its_own_delta(tmp_path, searches):
    """Catches defect D1 of the reference code, where only the last micro-batch was attacked."""
    trainer = make(
        tmp_path,
        **{**ATTACK, "attack_sites": ["2"]},
        benign=benign_data(),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    seen = watch_layer(trainer, 2)
    trainer.train()
    assert len(searches) == 8
    assert len(seen) == 8 * 3  # the wanted, the rejected and the benign rows of every micro-batch
    for number, (batch, found) in enumerate(searches):
        toward, away, benign = seen[3 * number : 3 * number + 3]
        assert (benign == 0).all()
        delta = found.deltas[2]
        assert (delta[found.selected].norm(dim=-1) > 0.05).all()
        # The attack's batch has the roles of the completions reversed.
        for added, mask in ((toward, batch["away_attention_mask"]), (away, batch["attention_mask"])):
            for row in range(2):
                for token, rank in enumerate(ranks(mask)[row].tolist()):
                    placed = rank < delta.shape[1] and mask[row, token] and found.selected[row, rank]
                    expected = delta[row, rank] if placed else torch.zeros(())
                    assert (added[row, token] - expected).abs().max() < 1e-5
    shown = [tuple(found.deltas[2].flatten()[:8].tolist()) for _, found in searches]
    assert len(set(shown)) == 8


def test_the_targeted_attack_draws_the_model_to_the_rejected_completion(tmp_path, searches):
    trainer = make(tmp_path, **ATTACK, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    with trainer.adversary.attacking(trainer._attack_batch(inputs), 0, 1):
        pass
    (given, found), *_ = searches
    assert torch.equal(given["labels"], inputs["away_labels"])
    assert torch.equal(given["away_labels"], inputs["labels"])
    assert found.losses[-1] < found.losses[0]


def test_lat_9_9_checkpointing_changes_no_bit_of_training_under_attack(tmp_path):
    runs = [
        train(tmp_path, **EVERYTHING, benign=benign_data(), activation_checkpointing=checkpointing, max_steps=3)
        for checkpointing in (True, False)
    ]
    assert_same(weights(runs[0]), weights(runs[1]))
    assert losses(runs[0]) == losses(runs[1])


def test_two_runs_of_the_same_seed_are_the_same_and_of_another_seed_are_not(tmp_path):
    settings = {**EVERYTHING, "benign": benign_data(), "attack_init": "random", "max_steps": 2}
    runs = [train(tmp_path, **settings, **seed) for seed in ({}, {}, {"seed": 8})]
    assert_same(weights(runs[0]), weights(runs[1]))
    assert distance(weights(runs[2]), weights(runs[0])) > 1e-4


class Gradients(TrainerCallback):
    """The norm of the model's gradients as the optimiser gets them."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        total = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
        self.norms.append(total.sqrt().item())


def test_lat_9_4_the_attack_is_neither_in_the_clip_norm_nor_in_the_optimiser(tmp_path, searches, monkeypatch):
    """Catches defect D4 of the reference code."""
    watched = Gradients()
    trainer = make(tmp_path, **ATTACK, max_steps=2, max_grad_norm=1e9, callbacks=[watched])
    clipped = []
    real = trainer.accelerator.clip_grad_norm_

    def clip(parameters, *args, **kwargs):
        parameters = list(parameters)
        clipped.append({id(parameter) for parameter in parameters})
        return real(parameters, *args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clip)
    trainer.train()
    own = {id(parameter) for parameter in trainer.model.parameters()}
    assert len(clipped) == 2 and all(given <= own for given in clipped)
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} <= own
    assert losses(trainer, "grad_norm") == pytest.approx(watched.norms, rel=1e-5)
    for _, found in searches:
        assert not any(delta.requires_grad or delta.grad is not None for delta in found.deltas.values())
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def by_hand(model, batch, found=None):
    """Log-probabilities `(N, V)` at the labelled tokens of a batch and the tokens, from the full logits."""
    positions = ranks(batch["attention_mask"])
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "position_ids": positions}
    with torch.no_grad():
        if found is None:
            logits = model(**arguments).logits
        else:
            with found.installed(model):
                logits = model(**arguments).logits
    shown = batch["labels"][:, 1:] != -100
    return logits[:, :-1][shown].log_softmax(-1), batch["labels"][:, 1:][shown]


def test_the_loss_is_the_sum_of_its_four_terms_as_means_over_tokens(tmp_path, searches):
    model = lora(tiny_model())
    trainer = make(
        tmp_path, **EVERYTHING, benign=benign_data(), dropout=None, model=model, max_steps=1, learning_rate=0.0
    )
    trainer.train()
    (given, found), *_ = searches
    chosen = {key: given[f"away_{key}"] for key in ("input_ids", "attention_mask", "labels")}
    batches = [
        batch for batch in trainer.get_train_dataloader() if torch.equal(batch["input_ids"], chosen["input_ids"])
    ]
    benign = batches[0]["benign"]
    model.eval()

    said, targets = by_hand(model, chosen, found)
    toward = -said.gather(1, targets[:, None]).mean()
    said, targets = by_hand(model, given, found)
    p = said.gather(1, targets[:, None]).exp()
    away = torch.where(p.log() >= -5, -torch.log1p(-p), 0.0).mean()
    said, targets = by_hand(model, benign)
    sft = -said.gather(1, targets[:, None]).mean()
    with model.disable_adapter():
        reference, _ = by_hand(model, benign)
    # D8: summed over the vocabulary, a mean over tokens, KL(model || reference).
    kl = (said.exp() * (said - reference)).sum(-1).mean()
    assert kl > 0.01

    log = trainer.state.log_history[0]
    for name, value in (("toward", toward), ("away", away), ("sft", sft), ("kl", kl)):
        assert log[f"{name}_loss"] == pytest.approx(value.item(), rel=1e-4), name
    expected = toward + 0.5 * away + 0.7 * sft + 0.3 * kl
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_divergence_is_zero_at_the_first_step_with_new_adapters_and_then_grows(tmp_path):
    """Catches defect D8: the reference code's term was not zero there, or had no gradient near it."""
    trainer = train(tmp_path, **EVERYTHING, benign=benign_data(), dropout=0.0, max_steps=3)
    divergence = losses(trainer, "kl_loss")
    assert divergence[0] == 0.0
    assert divergence[1] > 1e-6 and divergence[2] > 1e-6


def test_a_model_trained_whole_is_held_to_a_frozen_copy_of_its_start(tmp_path):
    trainer = make(tmp_path, **EVERYTHING, benign=benign_data(), dropout=None, max_steps=3)
    start = weights(trainer)
    trainer.train()
    with trainer.base.restored():
        assert_same(weights(trainer), start)
    assert distance(weights(trainer), start) > 1e-3
    divergence = losses(trainer, "kl_loss")
    assert divergence[0] == pytest.approx(0.0, abs=1e-7) and divergence[1] > 1e-6


def test_the_reference_is_taken_without_dropout_and_without_the_perturbation(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    trainer = make(tmp_path, **EVERYTHING, benign=benign_data(), dropout=0.5, model=model, max_steps=1)
    benign = next(iter(trainer.get_train_dataloader()))["benign"]
    trainer.model.train()
    logits = []
    for _ in range(2):
        with trainer.base.restored():
            logits.append(label_logits(trainer.model, **benign).logits)
    assert torch.equal(*logits) and trainer.model.training and not logits[0].requires_grad
    assert [p.requires_grad for p in trainer.model.parameters()].count(True) > 0


def test_each_term_can_be_trained_alone(tmp_path):
    coefficients = ("toward_coef", "away_coef", "sft_coef", "kl_coef")
    shown = {"toward_coef": "toward_loss", "away_coef": "away_loss", "sft_coef": "sft_loss", "kl_coef": "kl_loss"}
    for alone in coefficients:
        settings = {**EVERYTHING, **dict.fromkeys(coefficients, 0.0), alone: 2.0}
        trainer = train(
            tmp_path, **settings, benign=benign_data(), max_steps=1, dropout=None, model=lora(tiny_model())
        )
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(2 * log[shown[alone]], rel=1e-4)
        assert [key for key in shown.values() if key in log] == [shown[alone]]


def test_nothing_of_an_attack_is_left_on_the_model_after_training(tmp_path):
    trainer = make(tmp_path, **EVERYTHING, benign=benign_data(), max_steps=2)
    start = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in trainer.model.named_modules()}
    trainer.train()
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in trainer.model.named_modules()}
    # transformers puts one hook on the embedding when training with checkpointing begins.
    changed = {name for name in start if after[name] != start[name]}
    assert all("embed_tokens" in name for name in changed)
    assert trainer.adversary.current is None
    assert not any("forward" in module.__dict__ for module in decoder_layers(trainer.model))


def test_a_step_that_raises_leaves_no_perturbation_behind(tmp_path, monkeypatch):
    trainer = make(tmp_path, **ATTACK)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder_layers(trainer.model).modules())

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.accelerator, "backward", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.adversary.current is None
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder_layers(trainer.model).modules())
    assert after == hooks


# Several updates against one perturbation


def test_the_search_runs_once_for_every_m_updates_on_the_same_batch(tmp_path, searches):
    trainer = make(
        tmp_path,
        **ATTACK,
        updates_per_attack=3,
        max_steps=7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    steps, installed = [], []
    real = trainer.compute_loss

    def compute(model, inputs, *args, **kwargs):
        steps.append(inputs["input_ids"])
        installed.append(trainer.adversary.current)
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute
    trainer.train()
    assert len(searches) == 3 * 2  # attacks before updates 0, 3 and 6, on two micro-batches each
    assert len(installed) == 7 * 2
    for step in range(7):
        for micro in range(2):
            batch, found = searches[step // 3 * 2 + micro]
            assert installed[2 * step + micro] is found
            assert torch.equal(steps[2 * step + micro], batch["away_input_ids"])
    assert not torch.equal(searches[0][0]["input_ids"], searches[2][0]["input_ids"])


def test_every_row_is_trained_on_once_an_epoch_and_attack(tmp_path):
    trainer = make(tmp_path, **ATTACK, updates_per_attack=2, max_steps=-1, num_train_epochs=1)
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    assert len(order) == len(sampler) == 32  # 16 rows, two updates each
    for start in range(0, 32, 8):
        assert order[start : start + 4] == order[start + 4 : start + 8]
    assert sorted(set(order)) == list(range(16))
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_a_dataset_that_fills_no_batch_is_refused_where_batches_are_repeated(tmp_path):
    trainer = make(tmp_path, data=preference_data(3), updates_per_attack=2)
    with pytest.raises(ValueError, match="has 3 rows, and one update takes 4"):
        trainer.get_train_dataloader()


# What is logged, and evaluation


def test_what_a_person_watches_is_logged(tmp_path):
    trainer = train(tmp_path, **EVERYTHING, benign=benign_data(), max_steps=2)
    first, second = trainer.state.log_history[:2]
    assert {
        "attack_loss_before",
        "attack_loss_after",
        "boundary_fraction",
        "delta_norm/embedding",
        "delta_norm/2",
    } <= set(first)
    assert first["attack_loss_after"] < first["attack_loss_before"]
    assert 0 <= first["boundary_fraction"] <= 1
    assert 0 < first["delta_norm/2"] <= 0.3 + 1e-5
    # Two steps (forward and backward) and a last look, at two completions, with the embedding perturbed; then the
    # wanted, the rejected and the benign rows at three passes each, and the reference at one.
    rows = 4
    assert first["forward_passes"] == rows * (2 * (2 * 2 + 1) + 3 * 3 + 1)
    assert second["forward_passes"] == 2 * first["forward_passes"]


def test_the_random_control_costs_no_search_and_lies_on_the_boundary(tmp_path, searches):
    trainer = train(tmp_path, **{**ATTACK, "attack_objective": "random"}, max_steps=3)
    assert losses(trainer, "boundary_fraction") == [1.0] * 3
    assert all(len(found.losses) == 2 for _, found in searches)


def test_every_micro_batch_step_and_seed_draws_a_random_perturbation_of_its_own(tmp_path, searches):
    same = preference_data(1).select([0] * 16)  # rows alike, so that the deltas have the same shape
    for seed in (7, 8):
        train(
            tmp_path,
            **{**ATTACK, "attack_objective": "random"},
            data=same,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            seed=seed,
        )
    drawn = {tuple(found.deltas[2].flatten().tolist()) for _, found in searches}
    assert len(searches) == len(drawn) == 2 * 3 * 2


def test_evaluation_under_attack_has_the_higher_loss(tmp_path):
    rows = preference_data(8, seed=9)
    plain, attacked = (
        make(tmp_path, **{**ATTACK, "attack_steps": 6}, eval_dataset=rows, eval_under_attack=switch).evaluate()
        for switch in (False, True)
    )
    assert attacked["eval_loss"] > plain["eval_loss"] + 0.05
    assert attacked["eval_attack_loss_after"] < attacked["eval_attack_loss_before"]
    assert "eval_attack_loss_before" not in plain


def test_an_untargeted_evaluation_under_attack_has_the_higher_loss(tmp_path):
    rows = completion_data(8, seed=9)
    settings = {"attack_objective": "untargeted", "attack_radius": 0.3, "attack_steps": 4, "data": completion_data()}
    plain, attacked = (
        make(tmp_path, **settings, eval_dataset=rows, eval_under_attack=switch).evaluate()["eval_loss"]
        for switch in (False, True)
    )
    assert attacked > plain + 0.05


@pytest.mark.parametrize("init", ["zero", "random"])
def test_evaluation_under_attack_leaves_training_bit_identical(tmp_path, init):
    settings = {**EVERYTHING, "benign": benign_data(), "attack_init": init, "max_steps": 4, "updates_per_attack": 2}
    rows = preference_data(6, seed=9)
    # The evaluation's data loader draws a number from the global generator, attack or not: hence one in both.
    without, under = (
        train(tmp_path, **settings, eval_dataset=rows, eval_under_attack=switch, eval_strategy="steps", eval_steps=1)
        for switch in (False, True)
    )
    assert_same(weights(under), weights(without))
    assert losses(under) == losses(without)
    assert len(losses(under, "eval_loss")) == 4


def test_evaluating_twice_gives_the_same_number(tmp_path):
    trainer = make(
        tmp_path,
        **{**ATTACK, "attack_init": "random"},
        eval_dataset=preference_data(8, seed=9),
        eval_under_attack=True,
    )
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_held_perturbations_are_read_back_as_they_were_written(tmp_path):
    selected = torch.tensor([[True, False]])
    written = [
        Perturbation(
            {"embedding": torch.full((1, 2, 3), 1.0 + n), 10: torch.ones(1, 2, 3), 9: torch.zeros(1, 2, 3)},
            selected.clone(),
        )
        for n in range(11)
    ]
    save_held(written, tmp_path / "held.safetensors")
    read = load_held(tmp_path / "held.safetensors", "layer", torch.device("cpu"))
    assert len(read) == 11
    for one, other in zip(written, read, strict=True):
        assert one.deltas.keys() == other.deltas.keys()
        assert torch.equal(one.selected, other.selected)
        assert all(torch.equal(one.deltas[site], other.deltas[site]) for site in one.deltas)


def test_a_dataset_given_to_evaluate_is_treated_as_the_one_given_at_construction(tmp_path):
    rows = preference_data(8, seed=5)
    settings = {**ATTACK, "attack_steps": 6, "eval_under_attack": True}
    constructed = make(tmp_path, **settings, eval_dataset=rows).evaluate()["eval_loss"]
    trainer = make(tmp_path, **settings)
    assert trainer.evaluate(eval_dataset=rows)["eval_loss"] == constructed
    with pytest.raises(DataError, match="need preference data"):
        trainer.evaluate(eval_dataset=completion_data())


def test_several_updates_an_attack_follow_the_data_seed(tmp_path):
    def order(**changes) -> list[int]:
        return list(make(tmp_path, **{**ATTACK, "updates_per_attack": 2, **changes})._get_train_sampler())

    assert order() == order(data_seed=STOCK["seed"])
    assert order() != order(data_seed=STOCK["seed"] + 1)
